"""What every format of checkpoints comes down to: an architecture, and tensors that are read one at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import keras
import numpy as np
from tqdm import tqdm

from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import CheckpointError
from gemma2_keras.kernels import array, buffers, fill, stored

# Numbers looked at, or converted, at a time: as many as a processor's cache holds, and far more than a call costs.
_LOOKED_AT, _CONVERTED = 2**19, 2**24
# The smallest bit pattern that is no finite number, positive, of each dtype; with the sign in front, the negative one.
_INFINITY = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}


class Checkpoint(Protocol):
    """The weights of a text model, whole and as its architecture asks, wherever they are.

    Names and shapes are those of `names.weight_map(config)`, whatever the format has of its own.

    Attributes:
        config: the architecture.
    """

    config: Gemma2Config

    @property
    def dtype(self) -> str:
        """The dtype of the tensors, `"float32"`, `"bfloat16"` or `"float16"`; float32 where they differ."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype that it is kept in; it may be a view of a file."""
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
        """One tensor; over the memory of the weight where no adapter changes it."""
        weight = self._weights[name]
        owner = weight.layer_of(self._backbone)
        if getattr(owner, "adapter", None) is not None:
            return owner.merged_weight()
        return array(stored(weight.variable_of(self._backbone)))


def load_into(backbone: Any, checkpoint: Checkpoint, check_finite: bool = True) -> None:
    """Make the tensors of a checkpoint the weights of a backbone, one at a time, over the memory of files where it can.

    Args:
        backbone: a `Gemma2Backbone` of the checkpoint's architecture.
        checkpoint: its weights; those of another dtype than the backbone's are converted.
        check_finite: whether numbers that are none are refused.

    Raises:
        CheckpointError: if a tensor holds NaN or infinite numbers.
    """
    weights = weight_map(checkpoint.config)
    with ThreadPoolExecutor(2) as pool:
        for name in shown(weights, "Loading"):
            variable, value = weights[name].variable_of(backbone), checkpoint.read(name)
            if check_finite and not is_finite(value, pool):
                raise CheckpointError(
                    f"Tensor {name!r} holds numbers that are not finite (NaN or infinity): the checkpoint is damaged, "
                    "or its training diverged. `check_finite=False` loads it all the same."
                )
            fill(variable, converted(value, keras.backend.standardize_dtype(variable.dtype)))


def is_finite(value: np.ndarray, pool: ThreadPoolExecutor) -> bool:
    """Whether no number of a float32, bfloat16 or float16 array is NaN or infinite; the threads of `pool` look."""
    bits = 8 * value.dtype.itemsize
    words = np.ascontiguousarray(value).reshape(-1).view(f"uint{bits}")
    infinity, sign = _INFINITY[value.dtype.name], 1 << (bits - 1)

    def holds(start: int) -> bool:
        # What is not finite comes behind all that is: of positive numbers read with a sign, of negative ones without.
        part = words[start : start + _LOOKED_AT]
        return part.view(f"int{bits}").max() < infinity and part.max() < infinity + sign

    return all(pool.map(holds, range(0, len(words), _LOOKED_AT)))


def converted(value: np.ndarray, dtype: str) -> np.ndarray:
    """The array in a dtype, itself if it has it; what is on its way needs little memory."""
    if value.dtype == dtype:
        return value
    result = buffers.empty(value.shape, dtype)
    pieces = max(1, min(len(value), value.size // _CONVERTED)) if value.ndim else 1
    for source, place in zip(np.array_split(value, pieces), np.array_split(result, pieces), strict=True):
        place[...] = source
    return result


def shown(names: Iterable[str], doing: str) -> Iterator[str]:
    """The names in turn, with a bar of how many are done, where somebody looks on and it takes more than a moment."""
    notebook = type(sys.stdout).__module__ == "ipykernel.iostream"
    return iter(tqdm(names, doing, leave=False, delay=1, unit="tensor", disable=False if notebook else None))
