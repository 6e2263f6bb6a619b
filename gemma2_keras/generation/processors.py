"""What models, logits processors and samplers of users return, checked before a token is chosen from it."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from gemma2_keras.errors import InputError
from gemma2_keras.generation.sampling import EXCLUDED


def processed(processor: Any, ids: list[list[int]], logits: np.ndarray, going: np.ndarray) -> np.ndarray:
    """(B, V) logits as a processor returns them, checked in the rows that go on.

    Args:
        processor: called with the ids of all rows and the logits.
        ids: of each row.
        logits: (B, V) float32.
        going: numbers of the rows that go on.

    Raises:
        InputError: if it returns no logits, or some from which no token can be chosen.
    """
    name = getattr(processor, "__name__", type(processor).__name__)
    returned = processor(ids, logits.copy())
    try:
        changed = np.asarray(returned, "float32")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"Logits processor {name} must return logits of shape {logits.shape} as an array; it gave "
            f"{type(returned).__name__}, which is none ({error})."
        ) from error
    if changed.shape != logits.shape:
        given = "nothing: does it lack a `return`?" if returned is None else f"shape {changed.shape}."
        raise InputError(f"Logits processor {name} must return logits of shape {logits.shape}; it gave {given}")
    for row, top in zip(going, changed[going].max(axis=1), strict=True):
        # The greatest is NaN where any is.
        if np.isnan(top):
            what = "NaN"
        elif top <= EXCLUDED:
            what = "-inf for every token"
        elif top == np.inf == changed[row].min():
            what = "inf for every token"
        else:
            continue
        raise InputError(
            f"Logits processor {name} returned {what} in row {row}, from which no token can be chosen: return finite "
            "logits, and -inf only for tokens to leave out."
        )
    return np.clip(changed, EXCLUDED, -EXCLUDED)


def require_choice(logits: np.ndarray, values: dict[str, Any], going: np.ndarray) -> None:
    """Refuse a row in which `forbidden_tokens` leave out all that the processors have left.

    Args:
        logits: (B, V) as the processors left them.
        values: of the sampling.
        going: numbers of the rows that go on.

    Raises:
        InputError: if there is one.
    """
    if "bias" in values:
        left = (logits[going] + values["bias"] > EXCLUDED).any(axis=1)
        if not left.all():
            raise InputError(
                f"`logits_processors` and `forbidden_tokens` together leave no token to choose in row "
                f"{going[~left][0]}: let one of them allow at least one."
            )


def require_numbers(logits: np.ndarray, going: np.ndarray) -> None:
    """Refuse a model's (B, V) logits if no token can be chosen from them.

    Args:
        logits: (B, V) float32.
        going: (B,) bool, rows that get a token.

    Raises:
        InputError: if those of such a row are no finite numbers.
    """
    # The greatest is NaN where any is.
    if not np.isfinite(logits[going].max(axis=1)).all():
        raise no_numbers()


def no_numbers() -> InputError:
    """What to say of logits that are no finite numbers."""
    return InputError(
        "The model's logits are not finite, so that no token can be chosen: its weights, or an adapter's, hold NaN or "
        "infinity, as after a training that diverged, or its numbers are too large for its dtype. Load the weights "
        'anew, train with a lower learning rate, or use another `dtype`, such as "bfloat16" in place of "float16".'
    )


def checked_tokens(sampler: Any, tokens: Any, shape: tuple[int, int]) -> np.ndarray:
    """The tokens that a sampler of one's own has chosen.

    Args:
        sampler: a `keras_hub.samplers.Sampler`.
        tokens: what its `get_next_token` returned.
        shape: (B, V) of the probabilities it was given.

    Raises:
        InputError: if they are not one id of the vocabulary for each row.
    """
    rows, vocabulary = shape
    name = f"`{type(sampler).__name__}.get_next_token`"
    try:
        chosen = ops.convert_to_numpy(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must return a tensor of {rows} token ids; given {type(tokens).__name__}.") from error
    if chosen.shape != (rows,) or chosen.dtype.kind not in "iu":
        raise InputError(
            f"{name} must return a whole number for each of the {rows} rows; given shape {chosen.shape} and dtype "
            f"{chosen.dtype}."
        )
    if chosen.min() < 0 or chosen.max() >= vocabulary:
        raise InputError(
            f"{name} must return ids from 0 to {vocabulary - 1}; given {int(chosen.min())} to {int(chosen.max())}."
        )
    return chosen.astype("int32")
