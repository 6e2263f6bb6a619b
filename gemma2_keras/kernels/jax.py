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
    """As `ops.linear.linear`, summed in float32.

    Asked for a bfloat16 sum, XLA on a CPU makes a float32 copy of the weights of every layer.
    """
    return jnp.matmul(x, keras.ops.transpose(weight), preferred_element_type="float32").astype(x.dtype)


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
