"""Layers that cost no more than their work where a program is run again and again."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras

_is_lean = contextvars.ContextVar("is_lean", default=False)


class LeanLayer(keras.layers.Layer):
    """A layer whose call, within `lean`, is its `call`, without what Keras does around it.

    Keras looks at each argument, casts, and opens scopes: a tenth of a millisecond or more for each layer, which is a
    good part of a short prompt's time on PyTorch.
    """

    def __call__(self, *args, **kwargs):
        """As `keras.layers.Layer.__call__`."""
        if _is_lean.get():
            return self.call(*args, **kwargs)
        return super().__call__(*args, **kwargs)


@contextlib.contextmanager
def lean(model: Any) -> Iterator[None]:
    """Run the lean layers of a model that is built as directly as can be.

    Where Keras has something to do between layers, such as casting weights, it goes on doing it.

    Args:
        model: a model or layer; its layers have its dtype policy.
    """
    policy = model.dtype_policy
    plain = type(policy) is keras.DTypePolicy and policy.compute_dtype == policy.variable_dtype
    token = _is_lean.set(plain and keras.distribution.distribution() is None)
    try:
        yield
    finally:
        _is_lean.reset(token)
