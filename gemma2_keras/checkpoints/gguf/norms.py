"""Norms as GGUF keeps them: with one added, which rounding must not make a loss."""

from __future__ import annotations

import numpy as np


def plus_one(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A norm's weights as llama.cpp multiplies by them, and what rounding took away, so that nothing is lost.

    Source: Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    """
    weight = np.asarray(weight, np.float32)
    one = np.float32(1)
    total = one + weight
    with np.errstate(invalid="ignore"):
        counted = total - one
        remainder = (one - (total - counted)) + (weight - counted)
    # Where nothing was left of the weight it is kept as it is, since a sum knows no negative zero.
    remainder = np.where(total == one, weight, remainder)
    return total, np.where(np.isfinite(weight), remainder, np.float32(0))


def minus_one(total: np.ndarray, remainder: np.ndarray) -> np.ndarray:
    """The weights whose `plus_one` is given."""
    # In float64 the difference is exact wherever the remainder counts.
    weight = (total.astype(np.float64) - 1 + remainder).astype(np.float32)
    return np.where(total == 1, remainder, weight)
