"""A teacher's distributions of the next token, made once for all epochs of its student."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from gemma2_keras.errors import InputError
from gemma2_keras.generation.reading import read
from gemma2_keras.memory import available_bytes
from gemma2_keras.models.inputs import check_token_inputs
from gemma2_keras.tasks.generating import check_verbose
from gemma2_keras.training.token_dataset import TokenDataset

_IDS, _SHARES = "int32", "float32"


class TaughtDataset(TokenDataset):
    """A `TokenDataset` whose targets are those of `DistillationLoss`.

    Args:
        coverage: mean probability that the teacher gives to the words that were kept, from 0 to 1.
        *args: as `TokenDataset` takes them.
        **kwargs: likewise.

    Attributes:
        coverage: as given.

    Example:

    >>> x = {"token_ids": np.ones((1, 2), "int32"), "padding_mask": np.ones((1, 2), "int32")}
    >>> y = {"labels": np.ones((1, 2), "int32"), "teacher_ids": np.ones((1, 2, 1), "int32"),
    ...      "teacher_shares": np.ones((1, 2, 1), "float32")}
    >>> TaughtDataset(0.9, x, y, np.ones((1, 2), "float32")).coverage
    0.9
    """

    def __init__(self, coverage: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.coverage = coverage


def teach(teacher: Any, data: TokenDataset, student: Any, top_k: int = 32, *, verbose: Any = "auto") -> TaughtDataset:
    """Run a teacher once over prepared data, and keep what it expects at each token that counts.

    The student is then compiled with `loss=DistillationLoss()` and trained by `fit` or `fine_tune`, as often as is
    wanted, without the teacher. What is kept takes 6 `top_k` bytes of memory for each place of each sequence. The
    teacher reads each example by itself, also of those that are packed into a sequence; the logits of few tokens are
    made at a time.

    Args:
        teacher: a `Gemma2CausalLM`, which is not changed.
        data: what `prepare` made.
        student: the `Gemma2CausalLM` that is to learn, which is asked for its vocabulary alone.
        top_k: how many of the likeliest words are kept for each token. The more, the nearer to the whole distribution:
            the student learns their proportions, as if there were no other words. `coverage` of the result says how
            much of the probability they have.
        verbose: 1 or "auto" shows a progress bar, 0 none.

    Returns:
        The same data in the same batches, with `{"labels", "teacher_ids", "teacher_shares"}` as targets.

    Raises:
        InputError: if teacher, student and data do not share one vocabulary, `data` is no `TokenDataset` of labels or
            counts some at padding, an example is longer than the teacher's context, `top_k` is not from 1 to the size
            of the vocabulary, the teacher gives no numbers, or the result would not find room in memory.

    Example:

    >>> from gemma2_keras import DistillationLoss, Gemma2CausalLM, prepare
    >>> teacher = Gemma2CausalLM.from_preset("gemma2_tiny_en")
    >>> student = Gemma2CausalLM.from_preset("gemma2_tiny_en", load_weights=False)
    >>> data = prepare(["The cat sleeps."] * 2, student, sequence_length=8, batch_size=2)
    >>> taught = teach(teacher, data, student, top_k=4, verbose=0)
    >>> taught[0][1]["teacher_shares"].shape
    (2, 8, 4)
    >>> student.compile("adam", DistillationLoss())
    >>> history = student.fit(taught, verbose=0)

    Source: Gemma 2 (https://arxiv.org/abs/2408.00118), section 3; likeliest words kept for later, and what is lost with
    the others, https://arxiv.org/abs/2503.16870.
    """
    size = _shared_vocabulary(teacher, student)
    if not isinstance(data, TokenDataset) or isinstance(data.y, dict):
        raise InputError(
            "`data` must be a TokenDataset with labels, as `gemma2_keras.prepare` makes it; given "
            f"{type(data).__name__}{' with a teacher already' if isinstance(data, TokenDataset) else ''}."
        )
    if isinstance(top_k, bool) or not isinstance(top_k, int | np.integer) or not 1 <= top_k <= size:
        raise InputError(f"`top_k` must be a whole number from 1 to {size}, the words there are; given {top_k!r}.")
    check_verbose(verbose)
    check_token_inputs(data.x, size)
    shape = (*data.y.shape, int(top_k))
    _check_room(shape)
    counted = np.broadcast_to(np.asarray(data.sample_weight).reshape(len(data), -1) != 0, data.y.shape)
    _check_counted(counted, data.x["padding_mask"])
    rows, places = _examples(data.x, counted)
    first = np.cumsum([0, *map(len, rows)])
    _check_lengths(rows, teacher.backbone.config.context_length)
    ids, shares = np.zeros(shape, _IDS), np.zeros(shape, _SHARES)
    progress = keras.utils.Progbar(int(first[-1]), unit_name="token") if verbose else None
    programs = teacher.programs
    kept = total = 0.0
    for states, members, offsets in read(programs, rows):
        likeliest, probabilities = map(ops.convert_to_numpy, programs.likeliest(states, count=int(top_k)))
        at = places[first[members] + offsets]
        counts = counted[tuple(at.T)]
        some = tuple(at[counts].T)
        likeliest, probabilities = (x[: len(at)][counts] for x in (likeliest, probabilities))
        if not np.isfinite(probabilities).all():
            raise InputError(
                "The teacher's probabilities are no numbers: check its weights, and its dtype, since float16 ends at "
                "65504."
            )
        ids[some], shares[some] = likeliest, probabilities
        kept, total = kept + probabilities.sum(dtype="float64"), total + counts.sum()
        if progress is not None:
            progress.add(len(at))
    targets = {"labels": data.y, "teacher_ids": ids, "teacher_shares": shares}
    return TaughtDataset(
        float(min(1.0, kept / max(total, 1.0))),
        data.x,
        targets,
        data.sample_weight,
        batch_size=data.batch_size,
        shuffle=data.shuffle,
        seed=data.seed,
    )


def _examples(x: dict[str, np.ndarray], counted: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """The tokens of each example in which something counts, and the (n, 2) places of all of them in the arrays."""
    rows, places = [], [np.zeros((0, 2), "int64")]
    masks = np.asarray(x["padding_mask"]).astype("int32")
    for number, (token_ids, segments) in enumerate(zip(x["token_ids"], masks, strict=True)):
        for segment in np.unique(segments[segments != 0]):
            own = np.flatnonzero(segments == segment)
            if counted[number, own].any():
                # What stands behind the last token that counts is not read.
                own = own[: np.flatnonzero(counted[number, own])[-1] + 1]
                rows.append(np.asarray(token_ids)[own])
                places.append(np.stack([np.full_like(own, number), own], axis=1))
    return rows, np.concatenate(places)


def _shared_vocabulary(teacher: Any, student: Any) -> int:
    """The size of the vocabulary of both."""
    for name, model in (("teacher", teacher), ("student", student)):
        if not hasattr(model, "programs"):
            raise InputError(f"`{name}` must be a Gemma2CausalLM; given {type(model).__name__}.")
    sizes = [model.backbone.config.vocabulary_size for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"Teacher and student must share the vocabulary; the teacher has {sizes[0]} words, the student {sizes[1]}. "
            "Choose a teacher of the same family."
        )
    tokenizers = [None if model.preprocessor is None else model.preprocessor.tokenizer for model in (teacher, student)]
    protos = [tokenizer.proto for tokenizer in tokenizers if tokenizer is not None]
    if len(protos) == 2 and protos[0] != protos[1]:
        raise InputError(
            "Teacher and student must share the vocabulary; their tokenizers are different ones, so that one id stands "
            "for two words. Choose a teacher of the same family."
        )
    return sizes[0]


def _check_counted(counted: np.ndarray, padding_mask: np.ndarray) -> None:
    at_padding = counted & (np.asarray(padding_mask) == 0)
    if at_padding.any():
        place = tuple(int(i) for i in np.argwhere(at_padding)[0])
        raise InputError(
            f"`data` counts the label at {place}, which is padding, where a teacher expects nothing: give it the "
            "`sample_weight` 0, as `gemma2_keras.prepare` does."
        )


def _check_room(shape: tuple[int, ...]) -> None:
    needed = int(np.prod(shape)) * (np.dtype(_IDS).itemsize + np.dtype(_SHARES).itemsize)
    available = available_bytes()
    if available is not None and needed > available:
        raise InputError(
            f"What the teacher expects would take {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free: lower "
            "`top_k`, or teach and train on a part of the data after the other."
        )


def _check_lengths(rows: list[np.ndarray], context: int) -> None:
    longest = max(map(len, rows), default=0)
    if longest > context:
        raise InputError(
            f"An example has {longest} tokens, more than the teacher's context of {context}: prepare the data with "
            f"`sequence_length={context}`."
        )
