"""How weights start: small random numbers, or any when a checkpoint is about to fill them."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator

import keras
import ml_dtypes
import numpy as np

from gemma2_keras.kernels import empty, tensor

STANDARD_DEVIATION = 0.02
# Numbers drawn at once.
_BLOCK = 2**22

_awaiting_weights: contextvars.ContextVar[bool] = contextvars.ContextVar("awaiting_weights", default=False)


@contextlib.contextmanager
def awaiting_weights() -> Iterator[None]:
    """Matrices of layers built inside start as any numbers, which take no memory: a checkpoint has to replace them."""
    token = _awaiting_weights.set(True)
    try:
        yield
    finally:
        _awaiting_weights.reset(token)


def weight_initializer() -> keras.initializers.Initializer:
    """The initializer of every matrix: normal with deviation 0.02, or none inside `awaiting_weights`."""
    if _awaiting_weights.get():
        return Unset()
    return BlockwiseNormal(stddev=STANDARD_DEVIATION)


class Unset(keras.initializers.Initializer):
    """Numbers as memory happens to hold them."""

    def __call__(self, shape, dtype=None):
        """A tensor of the given shape."""
        return empty(shape, keras.backend.standardize_dtype(dtype))


@keras.saving.register_keras_serializable(package="gemma2_keras")
class BlockwiseNormal(keras.initializers.RandomNormal):
    """A normal initializer that draws a large matrix with NumPy, in blocks of rows.

    What a backend needs beside the numbers while it draws them is several times their own size: 256,000 rows drawn at
    once would take more memory than the whole model. What it frees afterwards stays with the process in pieces.
    """

    def __call__(self, shape, dtype=None):
        """Numbers of the given shape."""
        rows = max(1, _BLOCK // max(1, math.prod(shape[1:])))
        if shape[0] <= rows:
            return super().__call__(shape, dtype)
        dtype = keras.backend.standardize_dtype(dtype)
        numbers = np.empty(shape, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        draw, drawn = np.random.default_rng(self.seed), np.empty((rows, *shape[1:]), "float32")
        for start in range(0, shape[0], rows):
            block = numbers[start : start + rows]
            draw.standard_normal(out=drawn, dtype="float32")
            block[...] = drawn[: len(block)] * self.stddev + self.mean
        return tensor(numbers)
