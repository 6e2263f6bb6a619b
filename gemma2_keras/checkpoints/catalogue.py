"""The presets known by name: one JSON file each, packed with the package."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from pathlib import Path
from typing import Any

from gemma2_keras.checkpoints import description
from gemma2_keras.config import Gemma2Config, VisionConfig
from gemma2_keras.errors import PresetError, nearest
from gemma2_keras.sizes import parameter_parts

TEXT, CLASSIFIER, IMAGE_TEXT = "text", "classifier", "image-text"
_LOADED_AS_TEXT = (TEXT, CLASSIFIER)


@dataclasses.dataclass(frozen=True, repr=False)
class Preset:
    """What is known of a preset before anything is loaded; shown, it is a page about the model.

    Attributes:
        name: what `from_preset` takes.
        description: one line for people.
        architecture: hyperparameters of the text model.
        parameters: number of weights, the tied embedding counted once.
        license: name or address of the terms of the weights.
        folder: the weights' folder, if they are packed with this package.
        hugging_face: `owner/name` on Hugging Face, where they are not.
        hugging_face_revision: the commit there that is meant; `None` is the newest.
        kaggle: handle of the same weights on Kaggle, `kaggle://owner/model/framework/variation/version`, as KerasHub
            has it.
        dtype: that the weights get unless told otherwise.
        stop_token_ids: that end what the model says.
        kind: `"text"`, `"classifier"` (text, tuned to answer Yes or No) or `"image-text"`.
        vision: hyperparameters of the vision tower, of an image-text model.
    """

    name: str
    description: str
    architecture: Gemma2Config
    parameters: int
    license: str
    folder: Path | None
    hugging_face: str | None
    hugging_face_revision: str | None
    kaggle: str | None
    dtype: str
    stop_token_ids: tuple[int, ...]
    kind: str
    vision: VisionConfig | None

    @property
    def needs_download(self) -> bool:
        """Whether loading it fetches the weights."""
        return self.folder is None

    @property
    def is_text_model(self) -> bool:
        """Whether it is a Gemma 2 text model, which `Gemma2CausalLM` loads."""
        return self.kind in _LOADED_AS_TEXT

    @property
    def parameter_parts(self) -> dict[str, int]:
        """Number of weights of each part."""
        return parameter_parts(self.architecture, self.vision)

    def require_text_model(self) -> None:
        """See to it, before anything is fetched, that a text model was asked for.

        Raises:
            PresetError: if it is an image-text model; the message has the text model within it.
        """
        if not self.is_text_model:
            within = [p.name for p in _catalogue().values() if p.kind == TEXT and _same_text(self, p)]
            raise PresetError(
                f"{self.name} is a model of images and text, which Gemma2CausalLM and its parts do not load; for text "
                f"alone there is {' and '.join(within)}."
            )

    def __str__(self) -> str:
        return description.plain_text(self)

    # What an interpreter shows of a value is its representation.
    __repr__ = __str__

    def __rich__(self) -> Any:
        return description.as_rich(self)

    def _repr_html_(self) -> str:
        return description.as_html(self)


def list_presets() -> list[str]:
    """The names of all presets, smallest model first.

    >>> "gemma2_tiny_en" in list_presets()
    True
    """
    return list(_catalogue())


def describe_preset(name: str) -> Preset:
    """What is known of a preset; printed, or shown in a notebook, it is a page about the model.

    Raises:
        PresetError: if there is none of that name; the message has the nearest names.

    >>> describe_preset("gemma2_2b_en").parameters
    2614341888
    """
    if not isinstance(name, str):
        raise PresetError(f"`name` must be the name of a preset; given {type(name).__name__}.")
    presets = _catalogue()
    if name not in presets:
        raise PresetError(
            f"There is no preset {name[:80]!r}. {nearest(name[:80], presets)} "
            "`gemma2_keras.list_presets()` has all names; `from_preset` takes folders and handles, too."
        )
    return presets[name]


def text_presets() -> dict[str, dict[str, Any]]:
    """The presets that `Gemma2CausalLM` loads, each with what KerasHub's classes tell of theirs."""
    return {
        name: {
            "metadata": {"description": preset.description, "params": preset.parameters, "path": "gemma2"},
            "kaggle_handle": preset.kaggle,
        }
        for name, preset in _catalogue().items()
        if preset.is_text_model
    }


def _same_text(one: Preset, other: Preset) -> bool:
    """Whether two text models differ in nothing but the vocabulary."""
    size = one.architecture.vocabulary_size
    return dataclasses.replace(other.architecture, vocabulary_size=size) == one.architecture


@functools.cache
def _catalogue() -> dict[str, Preset]:
    root = Path(str(importlib.resources.files("gemma2_keras.presets")))
    presets = [_parse(path.stem, json.loads(path.read_text(encoding="utf-8")), root) for path in root.glob("*.json")]
    return {preset.name: preset for preset in sorted(presets, key=lambda p: (p.parameters, p.name))}


def _parse(name: str, entry: dict[str, Any], root: Path) -> Preset:
    own = {
        "architecture": Gemma2Config(**entry["architecture"]),
        "vision": VisionConfig(**entry["vision"]) if "vision" in entry else None,
        "stop_token_ids": tuple(entry["stop_token_ids"]),
        "folder": root / name if (root / name).is_dir() else None,
    }
    return Preset(name=name, **{**entry, **own})
