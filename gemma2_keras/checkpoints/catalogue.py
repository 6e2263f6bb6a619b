"""The presets known by name: one JSON file each, packed with the package."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from pathlib import Path
from typing import Any

from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import PresetError, nearest


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is known of a preset before anything is loaded.

    Attributes:
        name: what `from_preset` takes.
        description: one line for people.
        architecture: its hyperparameters.
        parameters: number of weights, the tied embedding counted once.
        license: name or address of the terms of the weights.
        folder: the weights' folder, if they are packed with this package.
        hugging_face: `owner/name` on Hugging Face, where they are not.
    """

    name: str
    description: str
    architecture: Gemma2Config
    parameters: int
    license: str
    folder: Path | None
    hugging_face: str | None

    @property
    def needs_download(self) -> bool:
        """Whether loading it fetches the weights from Hugging Face."""
        return self.folder is None


def list_presets() -> list[str]:
    """The names that `from_preset` takes, smallest model first.

    >>> "gemma2_tiny_en" in list_presets()
    True
    """
    return list(_catalogue())


def describe_preset(name: str) -> Preset:
    """What is known of a preset.

    Raises:
        PresetError: if there is none of that name; the message has the nearest names.

    >>> describe_preset("gemma2_2b_en").parameters
    2614341888
    """
    presets = _catalogue()
    if name not in presets:
        raise PresetError(
            f"There is no preset {name!r}. {nearest(name, presets)} "
            "`gemma2_keras.list_presets()` has all names; a folder or a handle hf://owner/name is taken too."
        )
    return presets[name]


@functools.cache
def _catalogue() -> dict[str, Preset]:
    root = Path(str(importlib.resources.files("gemma2_keras.presets")))
    presets = [_parse(path.stem, json.loads(path.read_text(encoding="utf-8")), root) for path in root.glob("*.json")]
    return {preset.name: preset for preset in sorted(presets, key=lambda p: (p.parameters, p.name))}


def _parse(name: str, entry: dict[str, Any], root: Path) -> Preset:
    architecture = Gemma2Config(**entry["architecture"])
    return Preset(
        name=name,
        description=entry["description"],
        architecture=architecture,
        parameters=architecture.parameter_count,
        license=entry["license"],
        folder=root / name if (root / name).is_dir() else None,
        hugging_face=entry.get("hugging_face"),
    )
