"""What every format of checkpoints comes down to: an architecture, and tensors that are read one at a time."""

from __future__ import annotations

from typing import Any, Protocol

import keras
import numpy as np

from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.config import Gemma2Config


class Checkpoint(Protocol):
    """The weights of a text model, whole and as its architecture asks, wherever they are.

    Names and shapes are those of `names.weight_map(config)`, whatever the format has of its own.

    Attributes:
        config: the architecture.
        dtype: the dtype of the tensors, `"float32"`, `"bfloat16"` or `"float16"`; float32 where they differ.
    """

    config: Gemma2Config

    @property
    def dtype(self) -> str:
        """The dtype of the tensors; float32 where they differ."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype that it is kept in; it may be a view of a file and must not be written to."""
        ...


class LiveCheckpoint:
    """A backbone in memory as a checkpoint, the adapter in effect merged into the weights.

    Args:
        backbone: a `Gemma2Backbone`.
    """

    def __init__(self, backbone: Any) -> None:
        self.config: Gemma2Config = backbone.config
        self._backbone = backbone
        self._weights = weight_map(self.config)

    @property
    def dtype(self) -> str:
        """The dtype of the weights."""
        return keras.backend.standardize_dtype(self._backbone.token_embedding.embeddings.dtype)

    def read(self, name: str) -> np.ndarray:
        """One tensor, copied from the device if need be."""
        weight = self._weights[name]
        merged = getattr(weight.layer_of(self._backbone), "merged_weight", None)
        value = keras.ops.convert_to_numpy(weight.variable_of(self._backbone)) if merged is None else merged()
        return np.ascontiguousarray(value)
