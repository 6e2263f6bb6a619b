"""Kernels on PyTorch, which runs as it goes: nothing is compiled but the CPU kernels."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
import torch

from gemma2_keras.kernels import native
from gemma2_keras.ops import attention as portable
from gemma2_keras.ops.cross_entropy import (
    LossTerms,
    Teacher,
    TokenSums,
    expected_cross_entropy,
    sparse_targets,
    tokens_at_once,
)
from gemma2_keras.ops.feed_forward import gated_gelu as portable_gated_gelu
from gemma2_keras.ops.linear import linear
from gemma2_keras.ops.norm import rms_norm as portable_rms_norm
from gemma2_keras.ops.rotary import apply_rotary as portable_apply_rotary

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

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def _library() -> Any:
    """The CPU kernels; `None` where they cannot be compiled."""
    library = native.library()
    if library is not None:
        _share_threads(library)
    return library


@functools.cache
def _share_threads(library: Any) -> None:
    """Offer the kernels PyTorch's own threads, where it has OpenMP."""
    openmp = sorted(Path(torch.__file__).parent.glob("lib/libgomp*"))
    if openmp:
        library.gemma2_share_threads(ctypes.cast(ctypes.CDLL(str(openmp[0])).GOMP_parallel, ctypes.c_void_p))


# Whether a program is compiled anew for other shapes.
STATIC_SHAPES = False


def _take(*tensors: Any) -> bool:
    """Whether our CPU kernels take such tensors: not where PyTorch traces its operations."""
    fit = all(x.device.type == "cpu" and x.dtype in _NATIVE_DTYPES for x in tensors)
    return fit and not torch.compiler.is_compiling() and _library() is not None


def attention(query: Any, key: Any, value: Any, mask: Any, scale: float, cap: float | None) -> Any:
    """As `ops.attention.attention`, without a matrix of scores on a CPU."""
    if not _take(query):
        return portable.attention(query, key, value, mask, scale, cap)
    return _Attention.apply(query, key, value, mask, scale, cap)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, scale, cap):
        query, key, value, mask = (x.detach().contiguous() for x in (query, key, value, mask))
        batch, length, heads, size = query.shape
        mixed = torch.empty_like(query)
        kept = any(ctx.needs_input_grad)
        normaliser = torch.empty((batch, heads, length) if kept else (0,))
        ctx.sizes = (batch, length, key.shape[1], heads, key.shape[2], size, scale, cap or 0.0, native.threads())
        _library().gemma2_attend(
            query.dtype == torch.bfloat16,
            *(x.data_ptr() for x in (query, key, value, mixed, mask)),
            normaliser.data_ptr() if kept else None,
            *ctx.sizes,
        )
        ctx.save_for_backward(query, key, value, mixed, mask, normaliser)
        return mixed

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, mixed, mask, normaliser = ctx.saved_tensors
        found = [torch.empty_like(x) for x in (query, key, value)]
        given = (query, key, value, mixed, gradient.contiguous(), *found, mask, normaliser)
        _library().gemma2_attend_gradient(query.dtype == torch.bfloat16, *(x.data_ptr() for x in given), *ctx.sizes)
        return *found, None, None, None


def rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """As `ops.norm.rms_norm`; on a CPU in one pass, where no gradients are recorded."""
    weight = keras.ops.convert_to_tensor(weight)
    if not _in_one_pass(x, weight):
        return portable_rms_norm(x, weight, epsilon)
    x, weight, y = x.contiguous(), weight.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    _library().gemma2_rms_norm(
        *(tensor.dtype == torch.bfloat16 for tensor in (x, weight)),
        *(tensor.data_ptr() for tensor in (x, weight, y)),
        *(len(weight) and x.numel() // len(weight), len(weight), epsilon, native.threads()),
    )
    return y


def gated_gelu(gate: Any, up: Any) -> Any:
    """As `ops.feed_forward.gated_gelu`; on a CPU in one pass, where no gradients are recorded."""
    if not _in_one_pass(gate, up) or gate.dtype != up.dtype:
        return portable_gated_gelu(gate, up)
    gate, up, y = gate.contiguous(), up.contiguous(), torch.empty(gate.shape, dtype=gate.dtype)
    _library().gemma2_gated_gelu(
        y.dtype == torch.bfloat16, *(x.data_ptr() for x in (gate, up, y)), y.numel(), native.threads()
    )
    return y


def apply_rotary(x: Any, cosine: Any, sine: Any) -> Any:
    """As `ops.rotary.apply_rotary`; on a CPU in one pass, where no gradients are recorded."""
    if not _in_one_pass(x):
        return portable_apply_rotary(x, cosine, sine)
    batch, length, heads, size = x.shape
    cosine, sine = (table.expand(batch, length, 1, size // 2).contiguous() for table in (cosine, sine))
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    _library().gemma2_rotate(
        y.dtype == torch.bfloat16,
        *(tensor.data_ptr() for tensor in (x, cosine, sine, y)),
        *(batch * length, heads, size, native.threads()),
    )
    return y


def _in_one_pass(*tensors: Any) -> bool:
    """Whether a kernel without a gradient takes them."""
    return not torch.is_grad_enabled() and _take(*tensors)


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
    counted = weights.nonzero()[:, 0]
    hidden, labels, weights = hidden[counted], labels[counted].long(), weights[counted]
    targets = sparse_targets(labels, teacher and Teacher(*(x[counted] for x in teacher)), terms)
    taught = teacher is not None
    return TokenSums(*_CrossEntropy.apply(hidden, table, targets, weights, cap, terms, training, table_trains, taught))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, table, targets, weights, cap, terms, training, table_trains, taught):
        hidden, table = hidden.detach().contiguous(), table.detach().contiguous()
        table_trains = training and table_trains
        fast = _take(hidden) and hidden.dtype == torch.float32
        # Of bfloat16 numbers PyTorch's products are faster; of the gradient of the table, the mean of all logits and
        # other words than the label the kernel knows nothing.
        if fast and len(hidden) and not (table_trains or terms.label_smoothing or taught):
            labels = targets[0][:, 0]
            found = native.expectation(hidden.numpy(), table.numpy(), cap, training)
            normaliser, first, expected = map(torch.from_numpy, found)
            sums, ctx.hidden_gradient = expected_cross_entropy(
                hidden, table, labels, weights, cap, terms, normaliser, first, expected if training else None
            )
            ctx.table_gradient = None
        else:
            sums, ctx.hidden_gradient, ctx.table_gradient = _summed(
                hidden, table, targets, weights, cap, terms, training, table_trains
            )
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx, factor, *_):
        table = None if ctx.table_gradient is None else ctx.table_gradient * factor
        return ctx.hidden_gradient * factor, table, *[None] * 7


def _summed(hidden, table, targets, weights, cap, terms, training, table_trains):
    """The sums, and the gradients of `loss` with respect to the states and the table, `None` if it is not trained."""
    sums = torch.zeros(3, device=hidden.device)
    hidden_gradient = torch.empty_like(hidden if training else hidden[:0])
    table_gradient = torch.zeros_like(table, dtype=torch.float32) if table_trains else None
    size = tokens_at_once(len(table))
    # Each block is worked on in place, in the same two buffers.
    logits, shares = (torch.empty(min(size, len(hidden)), len(table), device=hidden.device) for _ in range(2))
    for start in range(0, len(hidden), size):
        states, ids, amounts, weight = (x[start : start + size] for x in (hidden, *targets, weights))
        logits, shares = logits[: len(states)], shares[: len(states)]
        _cross_entropy_block(states, table, ids, amounts, weight, cap, terms, sums, logits, shares, training)
        if not training:
            continue
        gradient = shares.to(table.dtype)
        torch.mm(gradient, table, out=hidden_gradient[start : start + size])
        if table_gradient is not None:
            table_gradient += gradient.T @ states
    return sums.unbind(), hidden_gradient, table_gradient


def _cross_entropy_block(states, table, ids, amounts, weight, cap, terms, sums, logits, shares, training):
    """Add a block's sums to `sums` and, if `training`, leave the gradient of the loss by its raw logits in `shares`."""
    if table.dtype == torch.float32:
        torch.mm(states, table.T, out=logits)
    else:
        logits.copy_(states @ table.T)
    if cap is not None:
        # As a share of the cap, which the derivative needs later.
        logits.div_(cap).tanh_()
    scale = 1.0 if cap is None else cap
    top, first = logits.max(-1, keepdim=True)
    torch.sub(logits, top, out=shares).mul_(scale).exp_()
    total = shares.sum(-1)
    normaliser = top[:, 0] * scale + total.log()
    chosen = logits.gather(1, ids) * scale
    target = (amounts * chosen).sum(-1)
    if terms.label_smoothing:
        target += terms.uniform * scale * logits.mean(-1)
    loss = (1 - terms.softened) * normaliser - target + terms.z_loss * normaliser.square()
    if terms.softened:
        soft = (logits - top).mul_(scale / terms.temperature).exp_()
        soft_total = soft.sum(-1)
        loss += terms.softened * terms.temperature * (top[:, 0] * scale + terms.temperature * soft_total.log())
    each = torch.stack([loss, normaliser - chosen[:, 0], (first[:, 0] == ids[:, 0]).float()])
    sums += each @ weight
    if not training:
        return
    shares.mul_(((1 - terms.softened + 2 * terms.z_loss * normaliser) * weight / total)[:, None])
    if terms.softened:
        shares.addcmul_(soft, (terms.softened * terms.temperature * weight / soft_total)[:, None])
    if terms.label_smoothing:
        shares.sub_((terms.uniform / len(table) * weight)[:, None])
    shares.scatter_add_(1, ids, -amounts * weight[:, None])
    if cap is not None:
        shares.addcmul_(shares, logits.square_(), value=-1)


def write_slots(buffer: Any, slots: Any, values: Any) -> Any:
    """As `ops.cache.write_slots`, in place, where the rows of the buffer have memory of their own."""
    # A beam search hands over one row many times; then each gets its copy.
    buffer = buffer.contiguous()
    buffer[torch.arange(buffer.shape[0], device=buffer.device), slots] = values[:, 0].to(buffer.dtype)
    return buffer


def tensor(array: Any) -> Any:
    """A tensor of the numbers of a NumPy array, over its memory where there is one memory for both."""
    return keras.ops.convert_to_tensor(_over(array))


def _over(array: np.ndarray) -> Any:
    """A tensor over the memory of a NumPy array."""
    bfloat16 = array.dtype == ml_dtypes.bfloat16
    numbers = torch.from_numpy(array.view("uint16") if bfloat16 else array)
    return numbers.view(torch.bfloat16) if bfloat16 else numbers


def is_finite(numbers: np.ndarray) -> bool:
    """Whether no number of a float32, bfloat16 or float16 array, which has some, is NaN or infinite."""
    # The extremes of numbers among which there is NaN are NaN.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(_over(numbers)))


def array(x: Any) -> np.ndarray:
    """The numbers of a tensor as a NumPy array, over its memory where there is one memory for both."""
    x = x.detach().cpu()
    return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


def empty(shape: Sequence[int], dtype: str) -> Any:
    """A tensor of any numbers, whose memory is not taken before they are set."""
    return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=keras.ops.zeros(()).device)


def fill(variable: Any, numbers: np.ndarray) -> None:
    """Make a NumPy array of a Keras variable's shape and dtype its value, over the array's memory where that can be."""
    # A matrix that a file has turned round is a view across its rows, and kernels read rows.
    variable.value.data = tensor(np.ascontiguousarray(numbers))


def stored(variable: Any) -> Any:
    """The tensor in which a Keras variable is kept, not a copy of it."""
    return variable.value.detach()


def compiled(function: Callable, variables: Sequence[Any], traced: Callable[[], None], donate: int | None) -> Callable:
    """`function`, run without gradients.

    Args:
        function: of tensors, or trees of them, and keyword arguments.
        variables: without meaning here, as the others.
        traced: never called.
        donate: the result may take over the memory of any argument.
    """
    del variables, traced, donate

    def call(*arguments, **static):
        arguments = keras.tree.map_structure(_converted, arguments)
        with torch.no_grad():
            return function(*arguments, **static)

    return call


def _converted(x: Any) -> Any:
    return tensor(x) if isinstance(x, np.ndarray) else x
