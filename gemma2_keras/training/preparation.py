"""Data of any kind to a `TokenDataset`: tokenized, cut or packed, and counted."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from gemma2_keras.errors import InputError
from gemma2_keras.models.inputs import check_ids, check_token_inputs
from gemma2_keras.preprocessing.causal_lm_preprocessor import EncodedExample
from gemma2_keras.preprocessing.records import is_tokenized
from gemma2_keras.tasks.sources import finite_batches, unpacked
from gemma2_keras.training.jsonl import read_jsonl
from gemma2_keras.training.packing import pack
from gemma2_keras.training.token_dataset import TokenDataset

_TRUNCATIONS = ("end", "start", "drop", "error")


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What became of the examples that were prepared.

    Attributes:
        examples: how many were given.
        tokens: tokens that the sequences hold; of an example all but the last, which is a label only.
        counted_tokens: labels that count in the loss.
        sequences: rows of the dataset.
        sequence_length: tokens that a row has room for.
        cut_examples: examples of which a part was left out.
        cut_tokens: tokens that were left out of them.
        dropped_too_long: examples left out since they are too long, with `truncation="drop"`.
        dropped_uncounted: examples left out since nothing of them counts in the loss, after cutting.

    Example:

    >>> DataReport(examples=3, tokens=90, counted_tokens=40, sequences=1, sequence_length=100, cut_examples=1,
    ...            cut_tokens=12, dropped_too_long=0, dropped_uncounted=1)
    3 examples, 2 of them learned from
    90 tokens, 40 of them counted in the loss
    1 sequence of 100 tokens, 90% full
    1 example cut, by 12 tokens in all
    1 example dropped: nothing in it counts in the loss
    """

    examples: int
    tokens: int
    counted_tokens: int
    sequences: int
    sequence_length: int
    cut_examples: int = 0
    cut_tokens: int = 0
    dropped_too_long: int = 0
    dropped_uncounted: int = 0

    @property
    def fill(self) -> float:
        """Share of the sequences' room that tokens take, from 0 to 1."""
        return self.tokens / (self.sequences * self.sequence_length)

    def __repr__(self) -> str:
        kept = self.examples - self.dropped_too_long - self.dropped_uncounted
        lines = [
            _many(self.examples, "example") + (f", {kept:,} of them learned from" if kept < self.examples else ""),
            f"{_many(self.tokens, 'token')}, {self.counted_tokens:,} of them counted in the loss",
            f"{_many(self.sequences, 'sequence')} of {self.sequence_length:,} tokens, {self.fill:.0%} full",
        ]
        if self.cut_examples:
            lines.append(f"{_many(self.cut_examples, 'example')} cut, by {_many(self.cut_tokens, 'token')} in all")
        if self.dropped_too_long:
            lines.append(f"{_many(self.dropped_too_long, 'example')} dropped: too long")
        if self.dropped_uncounted:
            lines.append(f"{_many(self.dropped_uncounted, 'example')} dropped: nothing in it counts in the loss")
        return "\n".join(lines)


class PreparedDataset(TokenDataset):
    """A `TokenDataset` that says how it was made.

    Args:
        report: what became of the examples.
        *args: as `TokenDataset` takes them.
        **kwargs: likewise.

    Attributes:
        report: as given.
    """

    def __init__(self, report: DataReport, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.report = report


class _Piece(NamedTuple):
    """An example as (n,) arrays: tokens, the next tokens, and their weights."""

    token_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def prepare(
    data: Any,
    preprocessor: Any,
    sequence_length: int | None = None,
    batch_size: int = 8,
    *,
    packing: bool = False,
    truncation: str = "end",
    shuffle: bool = True,
    seed: int = 0,
) -> PreparedDataset:
    """Tokenize all data once, for `fit`.

    Args:
        data: a path to a file of JSON lines, or what `fit` takes and what ends: texts, columns, records, arrays of
            tokens as `(x, y, sample_weight)`, an iterator or a dataset of any library, of examples or of batches.
        preprocessor: a `Gemma2CausalLMPreprocessor`, or a model that has one.
        sequence_length: tokens in a sequence; `None` is the preprocessor's.
        batch_size: sequences in a step.
        packing: whether several short examples share a sequence. They do not see one another, and each has its own
            positions from 0, so that the model learns what it learns from them apart, in fewer steps.
        truncation: what is done with an example that is longer than a sequence: `"end"` cuts off its end, so that it
            has no `<eos>` and the model does not learn to stop there; `"start"` cuts off its start, behind `<bos>`;
            `"drop"` leaves it out; `"error"` raises.
        shuffle: whether epochs are shuffled.
        seed: of the shuffling.

    Returns:
        A `TokenDataset` whose `report` says what became of the examples.

    Raises:
        InputError: if an argument or the data is not what it should be, nothing of the data counts in the loss, or an
            example is too long with `truncation="error"`.
        OSError: if the file cannot be read.

    Example:

    >>> from gemma2_keras import Gemma2CausalLMPreprocessor
    >>> preprocessor = Gemma2CausalLMPreprocessor.from_preset("gemma2_tiny_en")
    >>> records = [{"prompt": "The cat", "response": " sleeps."}, {"prompt": "The dog", "response": " runs."}]
    >>> dataset = prepare(records, preprocessor, sequence_length=16, packing=True)
    >>> dataset[0][0]["padding_mask"][0].tolist()
    [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0, 0]
    """
    preprocessor, vocabulary_size = _resolved(preprocessor)
    length = preprocessor.resolved_length(sequence_length)
    _check_choices(batch_size, packing, truncation)
    pieces: list[_Piece] = []
    given = cut_examples = cut_tokens = too_long = uncounted = 0
    for piece in _pieces(_opened(data), preprocessor, vocabulary_size):
        excess = len(piece.token_ids) - length
        given += 1
        if excess > 0 and truncation == "error":
            raise InputError(
                f"Example {given - 1} has {len(piece.token_ids) + 1} tokens, more than the {length + 1} that "
                f'`sequence_length={length}` takes. Raise it, or choose `truncation="end"`, "start" or "drop".'
            )
        if excess > 0 and truncation == "drop":
            too_long += 1
            continue
        if excess > 0:
            piece = _cut(piece, length, truncation, preprocessor.tokenizer.start_token_id)
        if not piece.weights.any():
            uncounted += 1
            continue
        cut_examples += excess > 0
        cut_tokens += max(excess, 0)
        pieces.append(piece)
    if not pieces:
        raise InputError(
            f"Nothing to learn is left of {_many(given, 'example')}: {too_long} too long, {uncounted} in which nothing "
            "counts in the loss. Raise `sequence_length`, or choose another `truncation`."
        )
    rows = pack([len(piece.token_ids) for piece in pieces], length) if packing else [[i] for i in range(len(pieces))]
    x, y, weight = _placed(pieces, rows, length, preprocessor.tokenizer.pad_token_id)
    report = DataReport(
        examples=given,
        tokens=sum(len(piece.token_ids) for piece in pieces),
        counted_tokens=int(np.count_nonzero(weight)),
        sequences=len(rows),
        sequence_length=length,
        cut_examples=cut_examples,
        cut_tokens=cut_tokens,
        dropped_too_long=too_long,
        dropped_uncounted=uncounted,
    )
    return PreparedDataset(report, x, y, weight, batch_size=batch_size, shuffle=shuffle, seed=seed)


def _resolved(preprocessor: Any) -> tuple[Any, int]:
    """The preprocessor, and the ids that the model, or else the tokenizer, knows."""
    found = getattr(preprocessor, "preprocessor", preprocessor)
    if not hasattr(found, "encode_examples"):
        raise InputError(
            "`preprocessor` must be a Gemma2CausalLMPreprocessor, or a model that has one; given "
            f"{type(preprocessor).__name__}{' without one' if found is None else ''}."
        )
    if found is preprocessor:
        return found, found.tokenizer.vocabulary_size()
    return found, preprocessor.backbone.config.vocabulary_size


def _check_choices(batch_size: Any, packing: Any, truncation: Any) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"`batch_size` must be a whole number of at least 1; given {batch_size!r}.")
    if not isinstance(packing, bool):
        raise InputError(f"`packing` must be True or False; given {packing!r}.")
    if truncation not in _TRUNCATIONS:
        raise InputError(f"`truncation` must be one of {', '.join(_TRUNCATIONS)}; given {truncation!r}.")


def _opened(data: Any) -> Any:
    if isinstance(data, str) and not data.lower().endswith(".jsonl"):
        raise InputError(f"`data` as a string is a path to a .jsonl file; give texts as a list. Given {data[:60]!r}.")
    return read_jsonl(data) if isinstance(data, str | os.PathLike) else data


def _pieces(data: Any, preprocessor: Any, vocabulary_size: int) -> Iterator[_Piece]:
    for batch in finite_batches(data):
        x, y, sample_weight = unpacked(batch)
        if is_tokenized(x):
            yield from _of_tokens(x, y, sample_weight, vocabulary_size)
        elif y is not None or sample_weight is not None:
            raise InputError("Labels and weights are made from the text: give them beside tokens only.")
        else:
            yield from map(_of_example, preprocessor.encode_examples(x)[0])


def _of_example(example: EncodedExample) -> _Piece:
    token_ids = np.asarray(example.token_ids, "int32")
    return _Piece(token_ids[:-1], token_ids[1:], np.asarray(example.counted[1:], "float32"))


def _of_tokens(x: Any, y: Any, sample_weight: Any, vocabulary_size: int) -> Iterator[_Piece]:
    """Rows of tokens, without their padding; each of the examples packed into a row by itself."""
    check_token_inputs(x, vocabulary_size)
    if y is None:
        raise InputError("Tokens need labels: give `(x, y)` or `(x, y, sample_weight)`, as a preprocessor makes them.")
    if isinstance(y, dict):
        raise InputError("Data with a teacher's distributions are prepared already: `prepare` first, then `teach`.")
    token_ids, mask, y = (ops.convert_to_numpy(each) for each in (x["token_ids"], x["padding_mask"], y))
    weight = np.ones(y.shape, "float32") if sample_weight is None else ops.convert_to_numpy(sample_weight)
    weight = weight[:, None] if weight.ndim == 1 else weight
    if y.shape != token_ids.shape or weight.shape not in (y.shape, (len(y), 1)):
        raise InputError(
            f"`y` must have the shape of the token ids, {token_ids.shape}, and weights as well; given {y.shape} and "
            f"{weight.shape}."
        )
    check_ids(y, vocabulary_size, "y")
    weight = np.broadcast_to(weight, y.shape).astype("float32")
    for row, segments in enumerate(mask.astype("int32")):
        for segment in dict.fromkeys(segments[segments != 0].tolist()):
            own = segments == segment
            yield _Piece(token_ids[row][own].astype("int32"), y[row][own].astype("int32"), weight[row][own])


def _cut(piece: _Piece, length: int, truncation: str, start_token_id: int) -> _Piece:
    if truncation == "end":
        return _Piece(*(array[:length] for array in piece))
    token_ids, labels, weights = (array[len(array) - length :] for array in piece)
    if piece.token_ids[0] == start_token_id:
        token_ids = np.concatenate([piece.token_ids[:1], token_ids[1:]])
    return _Piece(token_ids, labels, weights)


def _placed(pieces: list[_Piece], rows: Iterable[list[int]], length: int, pad_token_id: int) -> tuple[Any, Any, Any]:
    """`(x, y, sample_weight)` of rows that hold the given pieces, numbered 1, 2, … in the padding mask."""
    rows = list(rows)
    token_ids, y = (np.full((len(rows), length), pad_token_id, "int32") for _ in range(2))
    mask, weight = np.zeros((len(rows), length), "int32"), np.zeros((len(rows), length), "float32")
    for r, members in enumerate(rows):
        start = 0
        for number, member in enumerate(members, start=1):
            piece = pieces[member]
            place = slice(start, start + len(piece.token_ids))
            token_ids[r, place], y[r, place], weight[r, place] = piece
            mask[r, place] = number
            start = place.stop
    return {"token_ids": token_ids, "padding_mask": mask}, y, weight


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
