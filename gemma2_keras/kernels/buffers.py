"""Arrays in memory that a backend can use as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

# Where JAX and TensorFlow want the numbers of a tensor to begin: at a multiple of so many bytes.
_ALIGNMENT = 64
# Threads that look at numbers: few keep up with the memory.
_THREADS = 2
# Numbers looked at, at a time: as many as a processor's cache holds, and far more than a call costs.
_LOOKED_AT = 2**19
# The smallest bit pattern that is no finite number, positive, of each dtype; with the sign in front, the negative one.
_INFINITY = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}


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


def is_finite(numbers: np.ndarray) -> bool:
    """Whether no number of a float32, bfloat16 or float16 array, which has some, is NaN or infinite.

    >>> is_finite(np.ones(3, "float32")), is_finite(np.array([1, np.nan], "float32"))
    (True, False)
    """
    bits = 8 * numbers.dtype.itemsize
    words = np.ascontiguousarray(numbers).reshape(-1).view(f"uint{bits}")
    infinity, sign = _INFINITY[numbers.dtype.name], 1 << (bits - 1)

    def holds(part: np.ndarray) -> bool:
        for start in range(0, len(part), _LOOKED_AT):
            block = part[start : start + _LOOKED_AT]
            # What is not finite comes behind all that is: of positive numbers read with a sign, of negative ones
            # without.
            if block.view(f"int{bits}").max() >= infinity or block.max() >= infinity + sign:
                return False
        return True

    if len(words) <= _LOOKED_AT:
        return holds(words)
    with ThreadPoolExecutor(_THREADS) as threads:
        return all(threads.map(holds, np.array_split(words, _THREADS)))
