"""Kernels and compilation on TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from gemma2_keras.ops.attention import attention, soft_cap
from gemma2_keras.ops.cross_entropy import LossTerms, TokenSums, tokens_at_once
from gemma2_keras.ops.linear import linear

__all__ = [
    "STATIC_SHAPES",
    "attention",
    "compiled",
    "linear",
    "projected_cross_entropy",
    "stored",
    "tensor",
    "write_slots",
]

# Whether a program is compiled anew for other shapes.
STATIC_SHAPES = False


def projected_cross_entropy(
    hidden: Any,
    table: Any,
    labels: Any,
    weights: Any,
    cap: float | None,
    terms: LossTerms,
    training: bool,
    table_trains: bool,
) -> TokenSums:
    """As `ops.cross_entropy.projected_cross_entropy`, some tokens at a time, with their gradient in the same pass.

    Tokens of weight 0 cost nothing.
    """
    counted = tf.where(weights != 0)[:, 0]
    hidden, labels, weights = (tf.gather(x, counted) for x in (hidden, labels, weights))

    @tf.custom_gradient
    def run(hidden, table):
        sums, hidden_gradient, table_gradient = _summed(
            hidden, table, labels, weights, cap, terms, training, training and table_trains
        )

        def backward(factor, *_):
            return (
                tf.cast(hidden_gradient * factor, hidden.dtype),
                tf.cast(table_gradient * factor, table.dtype) if table_trains else None,
            )

        return tuple(sums), backward

    sums: Any = run(hidden, tf.convert_to_tensor(table))
    return TokenSums(sums[0], *map(tf.stop_gradient, sums[1:]))


def _summed(hidden, table, labels, weights, cap, terms, gradient, table_trains):
    """The sums, and the gradients of `loss` with respect to the states and the table; zeros if not asked for."""
    count, width = tf.shape(hidden)[0], hidden.shape[1]
    vocabulary = table.shape[0]
    size = tokens_at_once(vocabulary)

    def add(start, sums, found, table_gradient):
        states, label, weight = (x[start : start + size] for x in (hidden, labels, weights))
        logits = soft_cap(tf.cast(tf.matmul(states, table, transpose_b=True), "float32"), cap)
        top = tf.reduce_max(logits, -1, keepdims=True)
        shares = tf.exp(logits - top)
        total = tf.reduce_sum(shares, -1)
        normaliser = top[:, 0] + tf.math.log(total)
        places = tf.stack([tf.range(tf.shape(label)[0], dtype=label.dtype), label], 1)
        chosen = tf.gather_nd(logits, places)
        target = (1 - terms.label_smoothing) * chosen
        if terms.label_smoothing:
            target += terms.label_smoothing * tf.reduce_mean(logits, -1)
        loss = normaliser - target + terms.z_loss * tf.square(normaliser)
        correct = tf.cast(tf.argmax(logits, -1, label.dtype) == label, "float32")
        each = (loss, normaliser - chosen, correct)
        sums = tuple(a + tf.reduce_sum(b * weight) for a, b in zip(sums, each, strict=True))
        if gradient:
            shares *= ((1 + 2 * terms.z_loss * normaliser) * weight / total)[:, None]
            if terms.label_smoothing:
                shares -= (terms.label_smoothing / vocabulary * weight)[:, None]
            shares = tf.tensor_scatter_nd_sub(shares, places, (1 - terms.label_smoothing) * weight)
            if cap is not None:
                shares *= 1 - tf.square(logits / cap)
            shares = tf.cast(shares, table.dtype)
            found = found.write(start // size, tf.cast(tf.matmul(shares, table), "float32"))
            if table_trains:
                table_gradient += tf.cast(tf.matmul(shares, states, transpose_a=True), "float32")
        return start + size, sums, found, table_gradient

    # Without any token there is one block, of none.
    end = tf.maximum(count, 1)
    found = tf.TensorArray("float32", (end + size - 1) // size, infer_shape=False, element_shape=[None, width])
    state = (0, (0.0, 0.0, 0.0), found, tf.zeros(table.shape if table_trains else ()))
    # One block at a time, or they would all be in memory.
    _, sums, found, table_gradient = tf.while_loop(lambda start, *_: start < end, add, state, parallel_iterations=1)
    return sums, found.concat() if gradient else None, table_gradient


def write_slots(buffer: Any, slots: Any, values: Any) -> Any:
    """As `ops.cache.write_slots`, touching the written slots alone."""
    rows = tf.range(tf.shape(buffer)[0], dtype=slots.dtype)
    return tf.tensor_scatter_nd_update(buffer, tf.stack([rows, slots], axis=1), tf.cast(values[:, 0], buffer.dtype))


def tensor(array: Any) -> Any:
    """A tensor of the numbers of a NumPy array."""
    return keras.ops.convert_to_tensor(array)


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
