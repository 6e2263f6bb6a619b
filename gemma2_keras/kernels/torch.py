"""Kernels on PyTorch, which runs as it goes: nothing is compiled but the CPU kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import ml_dtypes
import numpy as np
import torch

from gemma2_keras.kernels import native
from gemma2_keras.ops import attention as portable
from gemma2_keras.ops.linear import linear

__all__ = ["STATIC_SHAPES", "attention", "compiled", "linear", "stored", "write_slots"]

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)

# Whether a program is compiled anew for other shapes.
STATIC_SHAPES = False


def attention(query: Any, key: Any, value: Any, mask: Any, scale: float, cap: float | None) -> Any:
    """As `ops.attention.attention`, without a matrix of scores on a CPU; makes no gradients there."""
    library = native.library()
    if library is None or query.device.type != "cpu" or query.dtype not in _NATIVE_DTYPES:
        return portable.attention(query, key, value, mask, scale, cap)
    query, key, value, mask = (x.contiguous() for x in (query, key, value, mask))
    batch, length, heads, size = query.shape
    mixed = torch.empty_like(query)
    library.gemma2_attend(
        query.dtype == torch.bfloat16,
        *(x.data_ptr() for x in (query, key, value, mixed, mask)),
        *(batch, length, key.shape[1], heads, key.shape[2], size),
        *(scale, cap or 0.0, native.threads()),
    )
    return mixed


def write_slots(buffer: Any, slots: Any, values: Any) -> Any:
    """As `ops.cache.write_slots`, in place, where the rows of the buffer have memory of their own."""
    # A beam search hands over one row many times; then each gets its copy.
    buffer = buffer.contiguous()
    buffer[torch.arange(buffer.shape[0], device=buffer.device), slots] = values[:, 0].to(buffer.dtype)
    return buffer


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
        arguments = keras.tree.map_structure(_tensor, arguments)
        with torch.no_grad():
            return function(*arguments, **static)

    return call


def _tensor(x: Any) -> Any:
    """A tensor over the memory of an array, where there is one memory for both."""
    if not isinstance(x, np.ndarray):
        return x
    bfloat16 = x.dtype == ml_dtypes.bfloat16
    tensor = torch.from_numpy(x.view("uint16") if bfloat16 else x)
    return keras.ops.convert_to_tensor(tensor.view(torch.bfloat16) if bfloat16 else tensor)
