"""Kernels and compilation on JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras

from gemma2_keras.ops.attention import attention

__all__ = ["STATIC_SHAPES", "attention", "compiled", "linear", "stored", "write_slots"]

# Whether a program is compiled anew for other shapes.
STATIC_SHAPES = True


def linear(x: Any, weight: Any) -> Any:
    """As `ops.linear.linear`; the sums are float32, and so are a CPU's products of bfloat16 numbers.

    Asked for anything but this very product, XLA on a CPU makes a float32 copy of bfloat16 weights first.
    """
    return _linear(x, keras.ops.convert_to_tensor(weight))


@jax.custom_vjp
def _linear(x, weight):
    return _contracted(x, x.ndim - 1, weight, 1)


def _linear_forward(x, weight):
    return _linear(x, weight), (x, weight)


def _linear_backward(kept, gradient):
    x, weight = kept
    rows = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
    return _contracted(gradient, x.ndim - 1, weight, 0), _contracted(rows[0], 0, rows[1], 0)


_linear.defvjp(_linear_forward, _linear_backward)


def _contracted(a, axis, b, other):
    product = jax.lax.dot_general(a, b, (((axis,), (other,)), ((), ())), preferred_element_type="float32")
    return product.astype(a.dtype)


def write_slots(buffer: Any, slots: Any, values: Any) -> Any:
    """As `ops.cache.write_slots`, touching the written slots alone."""
    return buffer.at[jnp.arange(buffer.shape[0]), slots].set(values[:, 0].astype(buffer.dtype))


def stored(variable: Any) -> Any:
    """The tensor in which a Keras variable is kept, not a copy of it."""
    return variable.value


def compiled(function: Callable, variables: Sequence[Any], traced: Callable[[], None], donate: int | None) -> Callable:
    """`function` compiled once for each set of shapes and static arguments.

    Args:
        function: of tensors, or trees of them, and keyword arguments that are compiled in.
        variables: the Keras variables that it reads.
        traced: called each time the function is compiled.
        donate: the argument whose memory the result may take over; `None` for none.
    """

    def run(values, arguments, static):
        traced()
        with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
            return function(*arguments, **dict(static))

    def split(values, donated, others, static):
        arguments = list(others)
        if donate is not None:
            arguments.insert(donate, donated)
        return run(values, arguments, static)

    program = jax.jit(split, static_argnums=3, donate_argnums=() if donate is None else (1,))

    def call(*arguments, **static):
        others = list(arguments)
        donated = None if donate is None else others.pop(donate)
        return program([v.value for v in variables], donated, others, tuple(sorted(static.items())))

    return call
