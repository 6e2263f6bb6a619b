"""A preset on this machine, asked the same questions whatever its format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol

from gemma2_keras.checkpoints import keras_hub
from gemma2_keras.checkpoints.contents import Checkpoint
from gemma2_keras.checkpoints.fetching import OWN_FILE
from gemma2_keras.checkpoints.gguf import GgufCheckpoint
from gemma2_keras.checkpoints.guard import file_inside, read_json, read_vocabulary, shown, some
from gemma2_keras.checkpoints.keras_hub import KerasHubCheckpoint
from gemma2_keras.checkpoints.transformers import CONFIG_FILE, TOKENIZER_FILE, SafetensorsCheckpoint, parse_config
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import CheckpointError

FORMAT = 1
TOKENIZER_SETTINGS = {"parse_special": bool}
PREPROCESSOR_SETTINGS = {"sequence_length": int, "add_start_token": bool, "add_end_token": bool}
_PARTS = {"tokenizer": TOKENIZER_SETTINGS, "preprocessor": PREPROCESSOR_SETTINGS}


class Stored(Protocol):
    """What is asked of a preset; nothing is read before it is asked for."""

    def config(self) -> Gemma2Config:
        """The architecture.

        Raises:
            CheckpointError: if it is missing, broken, or asks for what is not implemented.
        """
        ...

    def dtype(self) -> str | None:
        """The dtype that it names for the weights; `None` if they have to be asked."""
        ...

    def checkpoint(self) -> Checkpoint:
        """The weights, checked and not read.

        Raises:
            CheckpointError: if they are not whole.
        """
        ...

    def proto(self) -> bytes | None:
        """The SentencePiece model; `None` if there is no tokenizer."""
        ...

    def settings(self, part: str) -> dict[str, Any]:
        """The constructor's arguments of the `"tokenizer"` or of the `"preprocessor"`, as far as they are known."""
        ...


def open_stored(path: Path) -> Stored:
    """A preset that `hub.resolve` has found: a folder, or a GGUF file."""
    if path.is_file():
        return _GgufPreset(path)
    config = file_inside(path, CONFIG_FILE)
    if config.exists() and keras_hub.is_keras_hub(read_json(config)):
        return _KerasHubPreset(path)
    return _Folder(path)


class _Folder:
    """A checkpoint of transformers, or one of ours: the same with a file for what transformers has no place for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def config(self) -> Gemma2Config:
        dropout = own_settings(self._folder).get("dropout", 0.0)
        return dataclasses.replace(parse_config(self._read_config()), dropout=dropout)

    def _read_config(self) -> dict[str, Any]:
        return read_json(file_inside(self._folder, CONFIG_FILE))

    def dtype(self) -> str | None:
        settings = self._read_config()
        dtype = settings.get("dtype", settings.get("torch_dtype"))
        if dtype not in (None, "float32", "bfloat16", "float16"):
            raise CheckpointError(f"`dtype` is {shown(dtype)}; allowed: float32, bfloat16, float16.")
        return dtype

    def checkpoint(self) -> Checkpoint:
        return SafetensorsCheckpoint(self._folder, self.config())

    def proto(self) -> bytes | None:
        return read_vocabulary(file_inside(self._folder, TOKENIZER_FILE))

    def settings(self, part: str) -> dict[str, Any]:
        return own_settings(self._folder).get(part, {})


class _KerasHubPreset:
    """A folder that KerasHub wrote, or we for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def config(self) -> Gemma2Config:
        return keras_hub.parse_config(read_json(file_inside(self._folder, CONFIG_FILE)))

    def dtype(self) -> str | None:
        return None

    def checkpoint(self) -> Checkpoint:
        return KerasHubCheckpoint(self._folder)

    def proto(self) -> bytes | None:
        path = keras_hub.find_vocabulary(self._folder)
        return None if path is None else read_vocabulary(path)

    def settings(self, part: str) -> dict[str, Any]:
        return keras_hub.read_preprocessor(self._folder) if part == "preprocessor" else {}


class _GgufPreset:
    """A GGUF file, as llama.cpp's converter and we write it."""

    def __init__(self, path: Path) -> None:
        self._checkpoint = GgufCheckpoint(path)

    def config(self) -> Gemma2Config:
        return self._checkpoint.config

    def dtype(self) -> str | None:
        return self._checkpoint.dtype

    def checkpoint(self) -> Checkpoint:
        return self._checkpoint

    def proto(self) -> bytes | None:
        return self._checkpoint.tokenizer_proto()

    def settings(self, part: str) -> dict[str, Any]:
        return {}


def own_settings(folder: Path) -> dict[str, Any]:
    """Our own file of a preset folder, checked; empty for a folder that we did not write."""
    path = file_inside(folder, OWN_FILE)
    if not path.exists():
        return {}
    own = read_json(path)
    if own.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {shown(own.get('format'))}; this version reads {FORMAT}. Install a newer gemma2-keras."
        )
    for part, types in _PARTS.items():
        value = own.get(part, {})
        if not isinstance(value, dict) or not set(value) <= set(types):
            raise CheckpointError(
                f"`{part}` in {path} must be an object with keys among {sorted(types)}; it is {shown(value)}."
            )
        for key, setting in value.items():
            if type(setting) is not types[key]:
                raise CheckpointError(
                    f"`{key}` in {path} must be of type {types[key].__name__}; it is {shown(setting)}."
                )
    dropout = own.get("dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise CheckpointError(f"`dropout` in {path} must be at least 0 and below 1; it is {shown(dropout)}.")
    unknown = set(own) - {"format", "dropout", *_PARTS}
    if unknown:
        raise CheckpointError(f"{path} has unknown keys: {some(unknown)}.")
    return own
