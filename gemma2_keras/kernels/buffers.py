"""Arrays in memory that a backend can use as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Where JAX and TensorFlow want the numbers of a tensor to begin: at a multiple of so many bytes.
_ALIGNMENT = 64


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An aligned array of any numbers, whose memory is not taken before they are set."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, "uint8")
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def aligned(array: np.ndarray) -> np.ndarray:
    """The array itself if its numbers lie in one aligned piece, or else a copy that does."""
    if array.flags.c_contiguous and array.ctypes.data % _ALIGNMENT == 0:
        return array
    copy, word = empty(array.shape, array.dtype), f"u{array.dtype.itemsize}"
    # As words: NumPy copies numbers that are not its own, such as bfloat16, one by one.
    copy.view(word)[...] = array.view(word)
    return copy
