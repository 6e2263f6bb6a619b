"""The class attribute `presets` that KerasHub's classes have."""

from __future__ import annotations

from typing import Any


class KnownPresets:
    """The presets that a class loads by name, each with what is told of it; KerasHub's own registry knows none of ours.

    Example:

    >>> from gemma2_keras import Gemma2Backbone
    >>> Gemma2Backbone.presets["gemma2_2b_en"]["metadata"]["params"]
    2614341888
    """

    def __get__(self, instance: Any, owner: type | None = None) -> dict[str, dict[str, Any]]:
        """A dictionary of the caller's own."""
        from gemma2_keras.checkpoints.catalogue import text_presets

        return text_presets()
