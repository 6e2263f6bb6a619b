"""Arrays in memory that a backend can use as it is."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

# Where JAX and TensorFlow want the numbers of a tensor to begin: at a multiple of so many bytes.
_ALIGNMENT = 64
# Arrays of at least so many bytes get memory of their own, in huge pages where there are any.
_LARGE = 2**22


def empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An aligned array of any numbers, whose memory is not taken before they are set."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE:
        memory = np.empty(size + _ALIGNMENT, "uint8")
        memory = memory[-memory.ctypes.data % _ALIGNMENT :]
    else:
        pages = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                pages.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(pages, "uint8")
    return memory[:size].view(dtype).reshape(shape)


def aligned(array: np.ndarray) -> np.ndarray:
    """The array itself if its numbers lie in one aligned piece, or else a copy that does."""
    if array.flags.c_contiguous and array.ctypes.data % _ALIGNMENT == 0:
        return array
    copy = empty(array.shape, array.dtype)
    copy[...] = array
    return copy
