"""Kernels and compilation on TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from gemma2_keras.ops.attention import attention
from gemma2_keras.ops.linear import linear

__all__ = ["STATIC_SHAPES", "attention", "compiled", "linear", "stored", "write_slots"]

# Whether a program is compiled anew for other shapes.
STATIC_SHAPES = False


def write_slots(buffer: Any, slots: Any, values: Any) -> Any:
    """As `ops.cache.write_slots`, touching the written slots alone."""
    rows = tf.range(tf.shape(buffer)[0], dtype=slots.dtype)
    return tf.tensor_scatter_nd_update(buffer, tf.stack([rows, slots], axis=1), tf.cast(values[:, 0], buffer.dtype))


def stored(variable: Any) -> Any:
    """The tensor in which a Keras variable is kept, not a copy of it."""
    return variable.value.read_value()


def compiled(function: Callable, variables: Sequence[Any], traced: Callable[[], None], donate: int | None) -> Callable:
    """`function` as a graph, traced once for each set of static arguments; batch and length are free.

    Args:
        function: of tensors, or trees of them, and keyword arguments that are compiled in.
        variables: the Keras variables that it reads; a graph finds them by itself.
        traced: called each time the function is traced.
        donate: without meaning here.
    """
    del variables, donate
    programs: dict[Any, Callable] = {}

    def call(*arguments, **static):
        arguments = tf.nest.map_structure(tf.convert_to_tensor, arguments)
        # Batch and length, the first two axes, are free: one program for all of them.
        signature = tf.nest.map_structure(_free, arguments)
        key = (tuple(tf.nest.flatten(signature)), tuple(sorted(static.items())))
        if key not in programs:

            def run(*given):
                traced()
                return function(*given, **static)

            program = tf.function(run, input_signature=signature, autograph=False)
            programs[key] = program.get_concrete_function()
        return programs[key](*arguments)

    return call


def _free(x: Any) -> Any:
    return tf.TensorSpec([None, None, *x.shape[2:]][: x.shape.rank], x.dtype)
