"""Checks of what a model is called with, whatever kind of tensor it is."""

from __future__ import annotations

import sys
from typing import Any

import keras
import numpy as np
from keras import ops

from gemma2_keras.errors import InputError


def check_token_inputs(inputs: Any, vocabulary_size: int) -> None:
    """Refuse inputs that are not `{"token_ids": (B, T) ints, "padding_mask": (B, T)}` with ids in the vocabulary.

    Shapes and dtypes are always checked; values only where they are known, which is outside a traced function.

    Raises:
        InputError: says what was given and what is allowed.
    """
    if not isinstance(inputs, dict) or not {"token_ids", "padding_mask"} <= set(inputs):
        given = sorted(inputs) if isinstance(inputs, dict) else type(inputs).__name__
        raise InputError(
            f'The model takes a dictionary with "token_ids" and "padding_mask"; given {given}. '
            "A preprocessor makes one from text: `model(preprocessor.generate_preprocess(texts))`."
        )
    token_ids, padding_mask = inputs["token_ids"], inputs["padding_mask"]
    for name, value in (("token_ids", token_ids), ("padding_mask", padding_mask)):
        if len(_shape(value)) != 2:
            raise InputError(f"`{name}` must have shape (batch, length); given shape {_shape(value)}.")
    if _shape(token_ids) != _shape(padding_mask) and None not in (*_shape(token_ids), *_shape(padding_mask)):
        raise InputError(
            f"`token_ids` and `padding_mask` must have one shape; given {_shape(token_ids)} and {_shape(padding_mask)}."
        )
    if 0 in _shape(token_ids):
        raise InputError(f"`token_ids` is empty: shape {_shape(token_ids)}. Give at least one row and one token.")
    dtype = _dtype(token_ids)
    if not dtype.startswith(("int", "uint")):
        raise InputError(f"`token_ids` must be whole numbers (int32); given dtype {dtype}.")
    mask_dtype = _dtype(padding_mask)
    if not mask_dtype.startswith(("int", "uint", "bool", "float", "bfloat")):
        raise InputError(f"`padding_mask` must be numbers, 0 for padding; given dtype {mask_dtype}.")
    if "float" in mask_dtype and not is_traced(padding_mask) and not np.isfinite(_values(padding_mask)).all():
        raise InputError("`padding_mask` must be finite numbers, 0 for padding; it holds NaN or infinity.")
    if not is_traced(token_ids):
        check_ids(_values(token_ids), vocabulary_size)


def check_ids(token_ids: np.ndarray, vocabulary_size: int, name: str = "token_ids") -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        InputError: names the first such id and its place.
    """
    outside = (token_ids < 0) | (token_ids >= vocabulary_size)
    if outside.any():
        place = tuple(int(i) for i in np.argwhere(outside)[0])
        raise InputError(
            f"`{name}` must lie between 0 and {vocabulary_size - 1}; given {int(token_ids[place])} at {place}. "
            "Was the text tokenized with another model's tokenizer?"
        )


def check_graph_ids(token_ids: Any, vocabulary_size: int, name: str) -> None:
    """As `check_ids`, of a TensorFlow tensor inside `tf.data.Dataset.map`, once its values come."""
    assertions = sys.modules["tensorflow"].debugging
    message = f"`{name}` must lie between 0 and {vocabulary_size - 1}. Was the text tokenized with another tokenizer?"
    assertions.assert_non_negative(token_ids, message)
    assertions.assert_less(token_ids, ops.cast(vocabulary_size, token_ids.dtype), message)


def check_weights(weights: Any) -> None:
    """Refuse a `sample_weight` that is no number, which would make all weights of the model so.

    Values are checked only where they are known, which is outside a traced function.

    Raises:
        InputError: names the first such weight and its place.
    """
    if weights is None or is_traced(weights):
        return
    values = np.asarray(weights if isinstance(weights, np.ndarray | list | tuple) else ops.convert_to_numpy(weights))
    finite = np.isfinite(values.astype("float64"))
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise InputError(
            f"`sample_weight` must be finite numbers; given {float(values[place])} at {place}. A weight of 0 leaves a "
            "token out."
        )


def is_traced(x: Any) -> bool:
    """Whether `x` stands for values that are not known yet: a symbolic Keras tensor or one inside a traced function."""
    if isinstance(x, keras.KerasTensor):
        return True
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(x, jax.core.Tracer):
        return True
    tensorflow = sys.modules.get("tensorflow")
    if tensorflow is not None and isinstance(x, tensorflow.Tensor):
        return not hasattr(x, "numpy")
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor) and (torch.compiler.is_compiling() or x.is_meta)


def _values(x: Any) -> np.ndarray:
    return np.asarray(x if isinstance(x, np.ndarray | list | tuple) else ops.convert_to_numpy(x))


def _shape(x: Any) -> tuple:
    if hasattr(x, "shape"):
        return tuple(x.shape)
    try:
        return np.shape(x)
    except ValueError as error:
        raise InputError(
            "The rows of `token_ids` and `padding_mask` must have one length: pad the shorter ones."
        ) from error


def _dtype(x: Any) -> str:
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    # Keras knows no strings and no objects.
    return dtype.name if isinstance(dtype, np.dtype) else keras.backend.standardize_dtype(dtype)
