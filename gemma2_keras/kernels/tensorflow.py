"""Kernels and compilation on TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from gemma2_keras.kernels import buffers, native
from gemma2_keras.kernels.buffers import is_finite
from gemma2_keras.ops.attention import attention, soft_cap
from gemma2_keras.ops.cross_entropy import (
    LossTerms,
    Teacher,
    TokenSums,
    expected_cross_entropy,
    sparse_targets,
    tokens_at_once,
)
from gemma2_keras.ops.feed_forward import gated_gelu
from gemma2_keras.ops.linear import linear
from gemma2_keras.ops.norm import rms_norm
from gemma2_keras.ops.rotary import apply_rotary

__all__ = [
    "STATIC_SHAPES",
    "apply_rotary",
    "array",
    "attention",
    "compiled",
    "empty",
    "fill",
    "gated_gelu",
    "is_finite",
    "linear",
    "projected_cross_entropy",
    "rms_norm",
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
    teacher: Teacher | None = None,
) -> TokenSums:
    """As `ops.cross_entropy.projected_cross_entropy`, some tokens at a time, with their gradient in the same pass.

    Tokens of weight 0 cost nothing.
    """
    # XLA compiles for one number of tokens.
    inside_xla = not tf.executing_eagerly() and GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
    if not inside_xla:
        counted = tf.where(weights != 0)[:, 0]
        hidden, labels, weights, teacher = tf.nest.map_structure(
            lambda x: None if x is None else tf.gather(x, counted), (hidden, labels, weights, teacher)
        )
    fast = not inside_xla and _is_fast(table)

    @tf.custom_gradient
    def run(hidden, table):
        arguments = hidden, table, labels, weights, cap, terms, training
        # Of the gradient of the table, the mean of all logits and other words than the label the kernel knows nothing.
        beyond = (training and table_trains) or terms.label_smoothing or teacher is not None
        if beyond or not fast:
            sums, hidden_gradient, table_gradient = _summed(*arguments, training and table_trains, teacher)
        else:
            sums, hidden_gradient = _summed_by_kernel(*arguments)
            table_gradient = None

        def backward(factor, *_):
            return (
                tf.cast(hidden_gradient * factor, hidden.dtype),
                tf.cast(table_gradient * factor, table.dtype) if table_trains else None,
            )

        return tuple(sums), backward

    sums: Any = run(hidden, tf.convert_to_tensor(table))
    return TokenSums(sums[0], *map(tf.stop_gradient, sums[1:]))


def _is_fast(table) -> bool:
    """Whether the CPU kernel can be called; TensorFlow's own products of bfloat16 numbers are faster."""
    elsewhere = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU")
    return table.dtype == tf.float32 and not elsewhere and native.library() is not None


def _summed_by_kernel(hidden, table, labels, weights, cap, terms, gradient):
    def run(hidden, table):
        return native.expectation(hidden, table, cap, gradient)

    normaliser, first, expected = tf.numpy_function(run, [hidden, table], (tf.float32, tf.int32, tf.float32))
    normaliser.set_shape([None])
    first.set_shape([None])
    expected.set_shape([None, hidden.shape[1]])
    return expected_cross_entropy(
        hidden, table, labels, weights, cap, terms, normaliser, first, expected if gradient else None
    )


def _summed(hidden, table, labels, weights, cap, terms, gradient, table_trains, teacher):
    """The sums, and the gradients of `loss` with respect to the states and the table; zeros if not asked for."""
    count, width = tf.shape(hidden)[0], hidden.shape[1]
    vocabulary = table.shape[0]
    # Without any token there is one block, of one that does not count.
    blocks = tf.maximum(-(-count // tokens_at_once(vocabulary)), 1)
    size = tf.maximum(-(-count // blocks), 1)

    def split(x):
        missing = tf.zeros([blocks * size - count, *x.shape[1:]], x.dtype)
        return tf.reshape(tf.concat([x, missing], 0), [blocks, size, *x.shape[1:]])

    examples = [split(x) for x in (hidden, labels, weights)]
    taught = None if teacher is None else Teacher(*map(split, teacher))

    def add(block, sums, found, table_gradient):
        states, label, weight = (x[block] for x in examples)
        ids, amounts = sparse_targets(label, taught and Teacher(*(x[block] for x in taught)), terms)
        logits = soft_cap(tf.cast(tf.matmul(states, table, transpose_b=True), "float32"), cap)
        top = tf.reduce_max(logits, -1, keepdims=True)
        shares = tf.exp(logits - top)
        total = tf.reduce_sum(shares, -1)
        normaliser = top[:, 0] + tf.math.log(total)
        rows = tf.broadcast_to(tf.range(tf.shape(ids)[0], dtype=ids.dtype)[:, None], tf.shape(ids))
        places = tf.stack([rows, ids], -1)
        chosen = tf.gather_nd(logits, places)
        target = tf.reduce_sum(amounts * chosen, -1)
        if terms.label_smoothing:
            target += terms.uniform * tf.reduce_mean(logits, -1)
        loss = (1 - terms.softened) * normaliser - target + terms.z_loss * tf.square(normaliser)
        if terms.softened:
            soft = tf.exp((logits - top) / terms.temperature)
            soft_total = tf.reduce_sum(soft, -1)
            loss += terms.softened * terms.temperature * (top[:, 0] + terms.temperature * tf.math.log(soft_total))
        correct = tf.cast(tf.argmax(logits, -1, label.dtype) == label, "float32")
        each = (loss, normaliser - chosen[:, 0], correct)
        sums = tuple(a + tf.reduce_sum(b * weight) for a, b in zip(sums, each, strict=True))
        if gradient:
            shares *= ((1 - terms.softened + 2 * terms.z_loss * normaliser) * weight / total)[:, None]
            if terms.softened:
                shares += soft * (terms.softened * terms.temperature * weight / soft_total)[:, None]
            if terms.label_smoothing:
                shares -= (terms.uniform / vocabulary * weight)[:, None]
            shares = tf.tensor_scatter_nd_sub(shares, places, amounts * weight[:, None])
            if cap is not None:
                shares *= 1 - tf.square(logits / cap)
            shares = tf.cast(shares, table.dtype)
            found = found.write(block, tf.cast(tf.matmul(shares, table), "float32"))
            if table_trains:
                table_gradient += tf.cast(tf.matmul(shares, states, transpose_a=True), "float32")
        return block + 1, sums, found, table_gradient

    found = tf.TensorArray("float32", blocks, element_shape=[None, width])
    state = (0, (0.0, 0.0, 0.0), found, tf.zeros(table.shape if table_trains else ()))
    # One block at a time, or they would all be in memory.
    _, sums, found, table_gradient = tf.while_loop(lambda block, *_: block < blocks, add, state, parallel_iterations=1)
    hidden_gradient = tf.reshape(found.stack(), [-1, width])[:count] if gradient else None
    return sums, hidden_gradient, table_gradient


def write_slots(buffer: Any, slots: Any, values: Any) -> Any:
    """As `ops.cache.write_slots`, touching the written slots alone."""
    rows = tf.range(tf.shape(buffer)[0], dtype=slots.dtype)
    return tf.tensor_scatter_nd_update(buffer, tf.stack([rows, slots], axis=1), tf.cast(values[:, 0], buffer.dtype))


def tensor(array: Any) -> Any:
    """A tensor of the numbers of a NumPy array."""
    return keras.ops.convert_to_tensor(array)


def array(x: Any) -> np.ndarray:
    """The numbers of a tensor as a NumPy array, over its memory where there is one memory for both."""
    return tf.convert_to_tensor(x).numpy()


def empty(shape: Sequence[int], dtype: str) -> Any:
    """A tensor of any numbers, whose memory is not taken before they are set."""
    return tf.raw_ops.Empty(shape=tuple(shape), dtype=dtype, init=False)


def fill(variable: Any, numbers: np.ndarray) -> None:
    """Make a NumPy array of a Keras variable's shape and dtype its value, over the array's memory where that can be."""
    numbers = buffers.aligned(numbers)
    # DLPack has no name for the bfloat16 of NumPy.
    words = numbers.view("uint16") if numbers.dtype.name == "bfloat16" else numbers
    shared = tf.experimental.dlpack.from_dlpack(words.__dlpack__())
    variable.assign(shared if words is numbers else tf.bitcast(shared, tf.bfloat16))


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
