"""Text and ids as users hold them, in any library's containers, made plain Python."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from gemma2_keras.errors import InputError


def to_python(x: Any) -> Any:
    """Strings and numbers out of arrays, tensors and bytes: `str`, `int`, and lists of them.

    Raises:
        InputError: if bytes are not UTF-8.
    """
    if isinstance(x, str) or x is None:
        return x
    if isinstance(x, bytes):
        try:
            return x.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"The text is not UTF-8: byte {x[error.start]:#04x} at {error.start}.") from error
    if isinstance(x, list | tuple):
        return [to_python(item) for item in x]
    if isinstance(x, np.ndarray | np.generic):
        return to_python(x.tolist())
    if hasattr(x, "to_list"):
        # A ragged tensor, or a column of a data frame.
        return to_python(x.to_list())
    if ops.is_tensor(x):
        # Also from a GPU, and out of a graph of gradients.
        return to_python(ops.convert_to_numpy(x))
    if hasattr(x, "numpy"):
        return to_python(x.numpy())
    if isinstance(x, Sequence):
        # A column of a Hugging Face dataset.
        return [to_python(item) for item in x]
    return x


def is_graph_tensor(x: Any) -> bool:
    """Whether `x` is a TensorFlow tensor inside `tf.data.Dataset.map` or a `tf.function`, its value not yet known."""
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(x, tensorflow.Tensor) and not hasattr(x, "numpy")
