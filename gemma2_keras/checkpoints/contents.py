"""What every format of checkpoints comes down to: an architecture, and tensors that are read one at a time."""

from __future__ import annotations

import math
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import keras
import numpy as np
from tqdm import tqdm

from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import CheckpointError
from gemma2_keras.kernels import array, buffers, fill, is_finite, stored
from gemma2_keras.layers.linear import Linear

# Numbers converted at a time.
_CONVERTED = 2**24


class Checkpoint(Protocol):
    """The weights of a text model, whole and as its architecture asks, wherever they are.

    Names and shapes are those of `names.weight_map(config)`, whatever the format has of its own.

    Attributes:
        config: the architecture.
        mapped: whether tensors, or all that are large, are views of files, so that reading one twice costs nothing.
    """

    config: Gemma2Config
    mapped: bool

    @property
    def dtype(self) -> str:
        """The dtype of the tensors, `"float32"`, `"bfloat16"` or `"float16"`; float32 where they differ."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype that it is kept in; it may be a view of a file."""
        ...


class LiveCheckpoint:
    """A backbone in memory as a checkpoint.

    Args:
        backbone: a `Gemma2Backbone`.
        merged: whether the adapter in effect is in the weights.
    """

    mapped = False

    def __init__(self, backbone: Any, merged: bool = True) -> None:
        self.config: Gemma2Config = backbone.config
        self._backbone = backbone
        self._merged = merged
        self._weights = weight_map(self.config)

    @property
    def dtype(self) -> str:
        """The dtype of the weights."""
        return keras.backend.standardize_dtype(self._backbone.token_embedding.embeddings.dtype)

    def read(self, name: str) -> np.ndarray:
        """One tensor; over the memory of the weight where no adapter changes it."""
        weight = self._weights[name]
        owner = weight.layer_of(self._backbone)
        if isinstance(owner, Linear) and owner.adapters:
            return owner.merged_weight() if self._merged else owner.base_weight()
        return array(stored(weight.variable_of(self._backbone)))


class ConvertedCheckpoint:
    """A checkpoint in another dtype.

    Args:
        checkpoint: whose tensors these are.
        dtype: of all tensors; `None` is that of the checkpoint.
    """

    mapped = False

    def __init__(self, checkpoint: Checkpoint, dtype: str | None) -> None:
        self.config = checkpoint.config
        self.dtype = checkpoint.dtype if dtype is None else dtype
        self._checkpoint = checkpoint

    def read(self, name: str) -> np.ndarray:
        """One tensor.

        Raises:
            ValueError: if it holds numbers that the dtype cannot hold.
        """
        return _fitting(name, self._checkpoint.read(name), self.dtype)


class WatchedCheckpoint:
    """A checkpoint whose tensors are looked at as they are read, while a bar shows how many are done.

    The bar appears where somebody looks on, and after a moment. To be used in a `with` statement.

    Args:
        checkpoint: whose tensors these are.
        doing: what is done with them, for the bar.
        check_finite: whether numbers that are none are refused.
    """

    def __init__(self, checkpoint: Checkpoint, doing: str, check_finite: bool = True) -> None:
        self.config = checkpoint.config
        self.mapped = checkpoint.mapped
        self._checkpoint = checkpoint
        self._check_finite = check_finite
        self._ahead = ThreadPoolExecutor(1)
        self._looks: dict[str, Future[bool]] = {}
        hidden = False if type(sys.stdout).__module__ == "ipykernel.iostream" else None
        count = len(weight_map(self.config))
        self._bar = tqdm(desc=doing, total=count, unit=" tensors", leave=False, delay=1, disable=hidden)

    @property
    def dtype(self) -> str:
        """The dtype of the tensors."""
        return self._checkpoint.dtype

    def look_ahead(self) -> None:
        """Begin to look at tensors that are views of files, beside all that is done before they are read."""
        if self._check_finite and self.mapped:
            self._looks = {name: self._ahead.submit(self._look, name) for name in weight_map(self.config)}

    def _look(self, name: str) -> bool:
        return is_finite(self._checkpoint.read(name))

    def read(self, name: str) -> np.ndarray:
        """One tensor, once.

        Raises:
            CheckpointError: if it holds NaN or infinite numbers.
        """
        value = self._checkpoint.read(name)
        look = self._looks.pop(name, None)
        if self._check_finite and not (is_finite(value) if look is None else look.result()):
            raise CheckpointError(
                f"Tensor {name!r} holds numbers that are not finite (NaN or infinity): the checkpoint is damaged, or "
                "its training diverged. `check_finite=False` takes it all the same."
            )
        self._bar.update()
        return value

    def __enter__(self) -> WatchedCheckpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        self._ahead.shutdown(cancel_futures=True)


def load_into(backbone: Any, checkpoint: Checkpoint) -> None:
    """Make the tensors of a checkpoint the weights of a backbone, one at a time, over the memory of files where it can.

    Args:
        backbone: a `Gemma2Backbone` of the checkpoint's architecture.
        checkpoint: its weights; those of another dtype than the backbone's are converted.

    Raises:
        ValueError: if they hold numbers that the backbone's dtype cannot hold.
    """
    for name, weight in weight_map(checkpoint.config).items():
        variable = weight.variable_of(backbone)
        fill(variable, _fitting(name, checkpoint.read(name), keras.backend.standardize_dtype(variable.dtype)))


def shards_of(checkpoint: Checkpoint, max_shard_size: float | None) -> list[list[str]]:
    """The names of the tensors, in groups that make a file each.

    Args:
        checkpoint: whose tensors these are.
        max_shard_size: most GB in one file, unless a single tensor is larger; `None` for a single file.
    """
    limit = math.inf if max_shard_size is None else max_shard_size * 1e9
    shards: list[list[str]] = [[]]
    size = 0
    for name, weight in weight_map(checkpoint.config).items():
        nbytes = math.prod(weight.shape) * np.dtype(checkpoint.dtype).itemsize
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _fitting(name: str, value: np.ndarray, dtype: str) -> np.ndarray:
    """A tensor in a dtype, if that can hold its numbers; float16 ends early."""
    with np.errstate(over="ignore"):
        result = converted(value, dtype)
    if result is not value and dtype == "float16" and not is_finite(result) and is_finite(value):
        raise ValueError(f"{name!r} has numbers that float16 cannot hold; choose `dtype` bfloat16 or float32.")
    return result


def converted(value: np.ndarray, dtype: str) -> np.ndarray:
    """The array in a dtype, itself if it has it; what is on its way needs little memory."""
    if value.dtype == dtype:
        return value
    result = buffers.empty(value.shape, dtype)
    rows, places = np.atleast_1d(value), np.atleast_1d(result)
    pieces = max(1, min(len(rows), value.size // _CONVERTED))
    for source, place in zip(np.array_split(rows, pieces), np.array_split(places, pieces), strict=True):
        place[...] = source
    return result
