"""What can go wrong, by name, so that a caller can tell the kinds apart. Imports no Keras."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable


class CheckpointError(ValueError):
    """A file or folder of weights cannot be read as what it says it is. Nothing was loaded."""


class PresetError(ValueError):
    """A preset name, handle or folder leads to no model."""


class InputError(ValueError):
    """Text, token ids or generation limits that the model cannot take."""


class WontFit(MemoryError):  # noqa: N818
    """A model needs more memory than there is. Nothing was downloaded, and nothing allocated.

    Example:

    >>> issubclass(WontFit, MemoryError)
    True
    """


def warn(message: str) -> None:
    """Give a `UserWarning` at the line that called this package, be it through Keras or its backend."""
    inside = ("gemma2_keras", "keras", "keras_hub", "torch", "tensorflow", "jax")
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def nearest(name: str, names: Iterable[str], most: int = 3) -> str:
    """The entries of `names` most like `name`, as a clause for an error message.

    >>> nearest("gemma2_tiny", ["gemma2_tiny_en", "gemma2_2b_en"], most=1)
    'Did you mean gemma2_tiny_en?'
    """
    close = difflib.get_close_matches(name, list(names), n=most, cutoff=0.4)
    return f"Did you mean {' or '.join(close)}?" if close else "No name is like it."
