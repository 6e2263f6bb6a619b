"""Kernels and compilation on JAX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from gemma2_keras.kernels import buffers, native
from gemma2_keras.kernels.buffers import is_finite
from gemma2_keras.ops import attention as portable
from gemma2_keras.ops.attention import soft_cap
from gemma2_keras.ops.cross_entropy import (
    LossTerms,
    Teacher,
    TokenSums,
    expected_cross_entropy,
    sparse_targets,
    tokens_at_once,
)
from gemma2_keras.ops.feed_forward import gated_gelu
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
STATIC_SHAPES = True

_NATIVE_DTYPES = ("float32", "bfloat16")
_TARGETS = ("gemma2_attention", "gemma2_attention_gradient", "gemma2_expectation")


@functools.cache
def _has_kernels() -> bool:
    """Whether XLA knows our CPU kernels, which are compiled at the first question."""
    library = native.compiled("xla.cpp", include=jax.ffi.include_dir())
    if library is None:
        return False
    for name in _TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def _called(target: str, results: Sequence[tuple[Sequence[int], Any]], *arguments: Any, **floats: float) -> Any:
    """What one of our kernels makes, given the shapes and dtypes of it."""
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results])
    attributes = {name: np.float64(number) for name, number in floats.items()}
    return call(*arguments, **attributes, threads=np.int64(native.threads()))


def attention(query: Any, key: Any, value: Any, mask: Any, scale: float, cap: float | None) -> Any:
    """As `ops.attention.attention`, without a matrix of scores on a CPU."""
    supported = jax.default_backend() == "cpu" and query.dtype in _NATIVE_DTYPES and query.shape[1] != 1
    if not (supported and _has_kernels()):
        return portable.attention(query, key, value, mask, scale, cap)
    return _attention(query, key, value, mask, scale, cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(query, key, value, mask, scale, cap):
    return _attended(query, key, value, mask, scale, cap, keep=False)[0]


def _attended(query, key, value, mask, scale, cap, keep):
    batch, length, heads, _ = query.shape
    results = (query.shape, query.dtype), ((batch, heads, length if keep else 0), "float32")
    return _called("gemma2_attention", results, query, key, value, mask, scale=scale, cap=cap or 0.0)


def _attention_forward(query, key, value, mask, scale, cap):
    mixed, normaliser = _attended(query, key, value, mask, scale, cap, keep=True)
    return mixed, (query, key, value, mixed, mask, normaliser)


def _attention_backward(scale, cap, kept, gradient):
    query, key, value, mixed, mask, normaliser = kept
    results = [(x.shape, x.dtype) for x in (query, key, value)]
    given = query, key, value, mixed, gradient, mask, normaliser
    return *_called("gemma2_attention_gradient", results, *given, scale=scale, cap=cap or 0.0), None


_attention.defvjp(_attention_forward, _attention_backward)


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
    return _product(a, axis, b, other).astype(a.dtype)


def _product(a, axis, b, other):
    return jax.lax.dot_general(a, b, (((axis,), (other,)), ((), ())), preferred_element_type="float32")


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
    """As `ops.cross_entropy.projected_cross_entropy`, some tokens at a time, with their gradient in the same pass."""
    if not training:
        return _summed(hidden, table, labels, weights, teacher, cap, terms)[0]
    sums: Any = _cross_entropy(hidden, table, labels, weights, teacher, cap, terms, table_trains)
    return TokenSums(sums.loss, *map(jax.lax.stop_gradient, sums[1:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _cross_entropy(hidden, table, labels, weights, teacher, cap, terms, table_trains):
    return _summed(hidden, table, labels, weights, teacher, cap, terms)[0]


def _cross_entropy_forward(hidden, table, labels, weights, teacher, cap, terms, table_trains):
    arguments = hidden, table, labels, weights, teacher
    sums, gradients = _summed(*arguments, cap, terms, gradient=True, table_trains=table_trains)
    # Of the arguments only the dtypes are needed later.
    return sums, (gradients, hidden[:0], table[:0])


def _cross_entropy_backward(cap, terms, table_trains, kept, factors):
    (hidden_gradient, table_gradient), hidden, table = kept
    scaled = (hidden_gradient * factors.loss).astype(hidden.dtype)
    table_scaled = None if table_gradient is None else (table_gradient * factors.loss).astype(table.dtype)
    return scaled, table_scaled, None, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _summed(hidden, table, labels, weights, teacher, cap, terms, gradient=False, table_trains=False):
    """The sums, and the gradients of `loss` with respect to the states and the table, `None` if not asked for."""
    arguments = hidden, table, labels, weights
    by_blocks = functools.partial(
        _summed_by_blocks, teacher=teacher, cap=cap, terms=terms, gradient=gradient, table_trains=table_trains
    )
    # Of the gradient of the table, the mean of all logits and other words than the label the kernel knows nothing.
    beyond = table_trains or terms.label_smoothing or teacher is not None
    if beyond or table.dtype not in _NATIVE_DTYPES or not _has_kernels():
        return by_blocks(*arguments)
    by_kernel = functools.partial(_summed_by_kernel, cap=cap, terms=terms, gradient=gradient)
    return jax.lax.platform_dependent(*arguments, cpu=by_kernel, default=by_blocks)


def _summed_by_kernel(hidden, table, labels, weights, cap, terms, gradient):
    count, width = hidden.shape
    results = ((count,), "float32"), ((count,), "int32"), ((count if gradient else 0, width), "float32")
    normaliser, first, expected = _called("gemma2_expectation", results, hidden, table, cap=cap or 0.0)
    sums, found = expected_cross_entropy(
        hidden, table, labels, weights, cap, terms, normaliser, first, expected if gradient else None
    )
    return sums, (found, None)


def _summed_by_blocks(hidden, table, labels, weights, teacher, cap, terms, gradient, table_trains):
    count, width = hidden.shape
    size = min(count, tokens_at_once(table.shape[0]))
    blocks = -(-count // size)

    def split(x):
        return jnp.pad(x, [(0, blocks * size - count)] + [(0, 0)] * (x.ndim - 1)).reshape(blocks, size, *x.shape[1:])

    def add(carry, block):
        states, label, weight, taught = block
        logits = soft_cap(_product(states, 1, table, 1), cap)
        top = logits.max(-1, keepdims=True)
        shares = jnp.exp(logits - top)
        total = shares.sum(-1)
        normaliser = top[:, 0] + jnp.log(total)
        ids, amounts = sparse_targets(label, taught, terms)
        chosen = jnp.take_along_axis(logits, ids, axis=-1)
        target = (amounts * chosen).sum(-1)
        if terms.label_smoothing:
            target += terms.uniform * logits.mean(-1)
        loss = (1 - terms.softened) * normaliser - target + terms.z_loss * jnp.square(normaliser)
        if terms.softened:
            soft = jnp.exp((logits - top) / terms.temperature)
            soft_total = soft.sum(-1)
            loss += terms.softened * terms.temperature * (top[:, 0] + terms.temperature * jnp.log(soft_total))
        correct = (logits.argmax(-1) == label).astype("float32")
        each = TokenSums(loss, normaliser - chosen[:, 0], correct)
        sums, table_gradient = carry
        sums = TokenSums(*(a + (b * weight).sum() for a, b in zip(sums, each, strict=True)))
        if not gradient:
            return (sums, None), None
        shares *= ((1 - terms.softened + 2 * terms.z_loss * normaliser) * weight / total)[:, None]
        if terms.softened:
            shares += soft * (terms.softened * terms.temperature * weight / soft_total)[:, None]
        if terms.label_smoothing:
            shares -= (terms.uniform / table.shape[0] * weight)[:, None]
        shares = _reduced(shares, ids, amounts * weight[:, None])
        if cap is not None:
            shares *= 1 - jnp.square(logits / cap)
        shares = shares.astype(table.dtype)
        if table_trains:
            table_gradient += _product(shares, 0, states, 0)
        return (sums, table_gradient), _product(shares, 1, table, 0)

    start = TokenSums(*(jnp.zeros((), "float32") for _ in TokenSums._fields))
    table_gradient = jnp.zeros(table.shape, "float32") if table_trains else None
    (sums, table_gradient), found = jax.lax.scan(
        add, (start, table_gradient), jax.tree.map(split, (hidden, labels, weights, teacher))
    )
    return sums, (None if found is None else found.reshape(-1, width)[:count], table_gradient)


def _reduced(shares, ids, amounts):
    """(M, V) shares less the (M, K) amounts at the (M, K) ids."""
    if ids.shape[1] > 1:
        return shares.at[jnp.arange(len(ids))[:, None], ids].add(-amounts)
    # Part of one pass over all numbers, as XLA joins them.
    return shares - jnp.where(jax.lax.broadcasted_iota("int32", shares.shape, 1) == ids, amounts, 0)


def write_slots(buffer: Any, slots: Any, values: Any) -> Any:
    """As `ops.cache.write_slots`, touching the written slots alone."""
    return buffer.at[jnp.arange(buffer.shape[0]), slots].set(values[:, 0].astype(buffer.dtype))


def tensor(array: Any) -> Any:
    """A tensor of the numbers of a NumPy array."""
    return keras.ops.convert_to_tensor(array)


def array(x: Any) -> np.ndarray:
    """The numbers of a tensor as a NumPy array, over its memory where there is one memory for both."""
    return np.asarray(x)


def empty(shape: Sequence[int], dtype: str) -> Any:
    """A tensor of any numbers, whose memory is not taken before they are set; zeros where memory is distributed."""
    if keras.distribution.distribution() is not None:
        return jnp.zeros(tuple(shape), dtype)
    return jax.device_put(buffers.empty(shape, jnp.dtype(dtype)))


def fill(variable: Any, numbers: np.ndarray) -> None:
    """Make a NumPy array of a Keras variable's shape and dtype its value, over the array's memory where that can be.

    Where the variable is spread over devices, each gets its part.
    """
    spread = keras.distribution.distribution() is not None
    variable.assign(numbers if spread else jax.device_put(buffers.aligned(numbers)))


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
