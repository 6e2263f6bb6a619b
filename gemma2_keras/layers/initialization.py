"""How weights start: small random numbers, or zeros when a checkpoint is about to fill them."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import keras

STANDARD_DEVIATION = 0.02

_awaiting_weights: contextvars.ContextVar[bool] = contextvars.ContextVar("awaiting_weights", default=False)


@contextlib.contextmanager
def awaiting_weights() -> Iterator[None]:
    """Layers built inside start from zeros: drawing random numbers that a checkpoint replaces would be time lost."""
    token = _awaiting_weights.set(True)
    try:
        yield
    finally:
        _awaiting_weights.reset(token)


def weight_initializer() -> keras.initializers.Initializer:
    """The initializer of every matrix: normal with deviation 0.02, or zeros inside `awaiting_weights`."""
    if _awaiting_weights.get():
        return keras.initializers.Zeros()
    return keras.initializers.RandomNormal(stddev=STANDARD_DEVIATION)
