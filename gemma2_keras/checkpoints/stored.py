"""A preset on this machine, asked the same questions whatever its format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol

from gemma2_keras.checkpoints.contents import Checkpoint
from gemma2_keras.checkpoints.gguf.reading import GgufCheckpoint
from gemma2_keras.checkpoints.guard import file_inside, read_json, read_vocabulary, shown
from gemma2_keras.checkpoints.keras_hub import settings as keras_hub
from gemma2_keras.checkpoints.keras_hub.weights import KerasHubCheckpoint
from gemma2_keras.checkpoints.own_file import own_settings
from gemma2_keras.checkpoints.tokenizer_json import TOKENIZER_JSON_FILE, sentencepiece_model
from gemma2_keras.checkpoints.transformers import CONFIG_FILE, TOKENIZER_FILE, SafetensorsCheckpoint, parse_config
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import CheckpointError


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

    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer, be it broken."""
        ...

    def proto(self) -> bytes | None:
        """The SentencePiece model; `None` if there is no tokenizer.

        Raises:
            CheckpointError: if it is broken, or no tokenizer of Gemma's.
        """
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

    def has_tokenizer(self) -> bool:
        return any(file_inside(self._folder, name).exists() for name in (TOKENIZER_FILE, TOKENIZER_JSON_FILE))

    def proto(self) -> bytes | None:
        proto = read_vocabulary(file_inside(self._folder, TOKENIZER_FILE))
        if proto is None and self.has_tokenizer():
            # All that transformers writes since its version 5.
            return sentencepiece_model(read_json(file_inside(self._folder, TOKENIZER_JSON_FILE)))
        return proto

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

    def has_tokenizer(self) -> bool:
        return keras_hub.find_vocabulary(self._folder) is not None

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

    def has_tokenizer(self) -> bool:
        return self._checkpoint.has_tokenizer

    def proto(self) -> bytes | None:
        return self._checkpoint.tokenizer_proto()

    def settings(self, part: str) -> dict[str, Any]:
        return {}
