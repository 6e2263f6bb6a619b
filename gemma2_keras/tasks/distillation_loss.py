"""The loss of a student, and the targets that a teacher makes for it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from gemma2_keras.errors import InputError
from gemma2_keras.models.inputs import check_ids, is_traced
from gemma2_keras.ops.cross_entropy import Teacher, token_losses
from gemma2_keras.tasks.next_token_loss import NextTokenLoss

# What a batch of targets is called whose labels come with a teacher's distributions.
TARGETS = ("labels", "teacher_ids", "teacher_shares")


@keras.saving.register_keras_serializable(package="gemma2_keras")
class DistillationLoss(NextTokenLoss):
    """Cross-entropy with a teacher's distribution of the next token, as the mean over the tokens that count, in nats.

    The gradient is that of the divergence KL(teacher || student), from which the loss differs by the teacher's own
    entropy. It is made as that of `NextTokenLoss`, some tokens at a time; accuracy and perplexity stay those of the
    labels. The targets `y` are `{"labels": (B, T) int32, "teacher_ids": (B, T, K) int32, "teacher_shares": (B, T, K)}`,
    which `gemma2_keras.teach` makes: the shares are the teacher's probabilities of its K likeliest words, and are taken
    as if these were all words, so that they sum to 1.

    Args:
        weight: share of the teacher in the loss, from 0 to 1; the rest is `NextTokenLoss` of the labels. With 1 it is
            what the small models of Gemma 2 were trained with.
        temperature: above 0; the logits of teacher and student are divided by it in the teacher's share of the loss,
            which is multiplied by its square.
        label_smoothing: as `NextTokenLoss`, of the share of the labels.
        z_loss: likewise, of the whole.
        name: of the loss.
        **kwargs: `reduction` and `dtype`, as `keras.losses.Loss` takes them.

    Raises:
        ValueError: if a number is out of its range.

    Example:

    >>> import numpy as np
    >>> logits = np.log([[[0.5, 0.25, 0.25]]]).astype("float32")
    >>> y = {"labels": np.array([[0]]), "teacher_ids": np.array([[[0, 2]]]), "teacher_shares": np.array([[[0.6, 0.2]]])}
    >>> round(float(DistillationLoss()(y, logits)), 4), round(float(-0.75 * np.log(0.5) - 0.25 * np.log(0.25)), 4)
    (0.8664, 0.8664)

    Source: distillation (https://arxiv.org/abs/1503.02531); with the weight 1, Gemma 2 (https://arxiv.org/abs/2408.00118);
    over some words, whose shares then sum to 1, Gemma 3 (https://arxiv.org/abs/2503.19786).
    """

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 1.0,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        name: str = "distillation_loss",
        **kwargs: Any,
    ) -> None:
        super().__init__(label_smoothing, z_loss, name=name, **kwargs)
        if not _is_number(weight) or not 0 <= weight <= 1:
            raise ValueError(f"`weight` must be a number from 0 to 1; given {weight!r}.")
        if not _is_number(temperature) or not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be a number above 0; given {temperature!r}.")
        self.terms = self.terms._replace(teacher_weight=float(weight), temperature=float(temperature))

    def call(self, y_true, y_pred):
        """Targets and (B, T, V) logits to (B, T) losses."""
        labels, teacher = split_targets(y_true)
        return token_losses(ops.cast(y_pred, "float32"), ops.cast(labels, "int32"), self.terms, teacher)[0]

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments."""
        own = {"weight": self.terms.teacher_weight, "temperature": self.terms.temperature}
        return {**super().get_config(), **own}


def split_targets(y: Any) -> tuple[Any, Teacher | None]:
    """Labels, and the teacher's distributions if there are any."""
    if not isinstance(y, Mapping):
        return y, None
    if set(y) != set(TARGETS):
        raise InputError(
            f"`y` with a teacher must have {', '.join(TARGETS)}, as `gemma2_keras.teach` makes them; given {sorted(y)}."
        )
    return y["labels"], Teacher(y["teacher_ids"], y["teacher_shares"])


def check_targets(y: Any, sample_weight: Any, vocabulary_size: int) -> None:
    """Refuse targets that no loss can be made of. Values are checked where they are known, outside a traced function.

    Args:
        y: (B, T) labels, or the targets of `DistillationLoss`.
        sample_weight: weights of the tokens, or `None`.
        vocabulary_size: V.

    Raises:
        InputError: names what is wrong, and its place.
    """
    labels, teacher = split_targets(y)
    if teacher is not None:
        _check_shapes(labels, teacher)
    if is_traced(labels):
        return
    check_ids(ops.convert_to_numpy(labels), vocabulary_size, "y" if teacher is None else "labels")
    if teacher is None:
        return
    ids, shares = (ops.convert_to_numpy(x) for x in teacher)
    check_ids(ids, vocabulary_size, "teacher_ids")
    # Also of bfloat16 arrays.
    shares = shares.astype("float32")
    wrong = ~(np.isfinite(shares) & (shares >= 0))
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise InputError(
            f"`teacher_shares` must be finite numbers of at least 0, probabilities; given {shares[place]} at {place}."
        )
    counted = np.ones(labels.shape) if sample_weight is None else ops.convert_to_numpy(sample_weight)
    counted = counted[:, None] if counted.ndim == 1 else counted
    if counted.shape not in (labels.shape, (labels.shape[0], 1)):
        # Refused with the loss, as they are beside labels alone.
        return
    empty = ~shares.any(-1) & (counted != 0)
    if empty.any():
        place = tuple(int(i) for i in np.argwhere(empty)[0])
        raise InputError(
            f"`teacher_shares` are all 0 at {place}, whose label counts: give each token that counts at least one "
            "share above 0, or the token the weight 0."
        )


def _check_shapes(labels: Any, teacher: Teacher) -> None:
    shapes = [tuple(x.shape) for x in (labels, *teacher)]
    dtypes = [keras.backend.standardize_dtype(x.dtype) for x in teacher]
    fits = len(shapes[0]) == 2 and len(shapes[1]) == 3 and shapes[1] == shapes[2] and shapes[1][2] != 0
    if not fits or not all(None in pair or pair[0] == pair[1] for pair in zip(shapes[0], shapes[1][:2], strict=True)):
        raise InputError(
            "`teacher_ids` and `teacher_shares` must have shape (batch, length, K) beside labels (batch, length); "
            f"given {shapes[1]} and {shapes[2]} beside {shapes[0]}."
        )
    if "int" not in dtypes[0] or "float" not in dtypes[1]:
        raise InputError(
            f"`teacher_ids` must be whole numbers and `teacher_shares` floats; given {dtypes[0]} and {dtypes[1]}."
        )


def _is_number(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)
