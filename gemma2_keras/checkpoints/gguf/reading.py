"""GGUF files as checkpoints."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from gemma2_keras.checkpoints.gguf.architecture import (
    REMAINDER,
    parse_architecture,
)
from gemma2_keras.checkpoints.gguf.container import read_container
from gemma2_keras.checkpoints.gguf.norms import minus_one
from gemma2_keras.checkpoints.gguf.tokenizer import describes_tokenizer, find_stop_token_ids, sentencepiece_model
from gemma2_keras.checkpoints.guard import shown, some
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import CheckpointError

if TYPE_CHECKING:
    pass


class GgufCheckpoint:
    """A GGUF file of a Gemma 2 text model, whole and as expected before any tensor is read.

    Args:
        path: of a file that `write_gguf` or llama.cpp's converter wrote, in float32, float16 or bfloat16.

    Attributes:
        config: the architecture. A file knows no dropout.

    Raises:
        CheckpointError: if the file is missing, truncated, broken, quantised or of another architecture; has a key that
            would change what is computed and is not implemented; or a tensor is missing, extra or misshapen.

    Example: see `write_gguf`.
    """

    mapped = True

    def __init__(self, path: str | os.PathLike) -> None:
        self._keys, self._tensors = read_container(path)
        self.config: Gemma2Config = parse_architecture(self._keys, {name: t.shape for name, t in self._tensors.items()})
        self._weights = weight_map(self.config)
        expected = {weight.gguf: weight.shape for weight in self._weights.values()}
        missing, extra = expected.keys() - self._tensors.keys(), self._tensors.keys() - expected.keys()
        if missing:
            raise CheckpointError(f"{path} lacks {len(missing)} tensors: {some(missing)}.")
        if extra:
            raise CheckpointError(f"{path} has {len(extra)} tensors that no Gemma 2 has: {some(extra)}.")
        for name, shape in expected.items():
            if self._tensors[name].shape != shape:
                raise CheckpointError(
                    f"Tensor {name!r} has shape {self._tensors[name].shape}; the keys of the file ask {shape}."
                )
        self._check_own_keys()

    def _check_own_keys(self) -> None:
        norms = {weight.gguf: weight.shape for weight in self._weights.values() if len(weight.shape) == 1}
        for key, value in self._keys.items():
            if key.startswith(REMAINDER):
                norm = key.removeprefix(REMAINDER)
                fits = isinstance(value, np.ndarray) and value.dtype == np.float32 and value.shape == norms.get(norm)
                if not fits or not np.isfinite(value).all():
                    raise CheckpointError(f"`{REMAINDER}…` is no float32 for each number of a norm: {shown(norm)}.")

    @property
    def dtype(self) -> str:
        """The dtype of the matrices; float32 where they differ."""
        dtypes = {self._tensors[w.gguf].values.dtype.name for w in self._weights.values() if len(w.shape) == 2}
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file has a tokenizer."""
        return describes_tokenizer(self._keys)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text; none where the file does not say.

        Raises:
            CheckpointError: if one is outside the vocabulary.
        """
        return find_stop_token_ids(self._keys, self.config.vocabulary_size)

    def read(self, name: str) -> np.ndarray:
        """One tensor; a matrix as a view of the file, a norm's weights in the checkpoint's dtype.

        Raises:
            CheckpointError: if that dtype cannot hold a norm's weights, which files have in float32.
        """
        weight = self._weights[name]
        value = self._tensors[weight.gguf].values
        if len(weight.shape) == 2:
            return value
        remainder = self._keys.get(REMAINDER + weight.gguf, np.zeros(weight.shape, np.float32))
        with np.errstate(over="ignore"):
            norm = minus_one(value.astype(np.float32), remainder).astype(self.dtype)
        if (np.isinf(norm) & np.isfinite(value)).any():
            raise CheckpointError(f"Tensor {weight.gguf!r} has numbers that {self.dtype} cannot hold.")
        return norm

    def tokenizer_proto(self) -> bytes | None:
        """A SentencePiece model that gives the file's token ids, for `Gemma2Tokenizer`; `None` if it has no tokenizer.

        Raises:
            CheckpointError: if the tokenizer is of another kind than Gemma's, or broken.
        """
        return sentencepiece_model(self._keys, self.config.vocabulary_size)
