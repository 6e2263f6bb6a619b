"""From what a user asks of `generate` to sessions of the engine, and back."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from typing import Any

import keras
import numpy as np
from keras import ops

from gemma2_keras.errors import InputError
from gemma2_keras.generation.engine import cache_bytes
from gemma2_keras.generation.programs import Engine
from gemma2_keras.generation.sampling import Sampling
from gemma2_keras.generation.session import Session
from gemma2_keras.generation.streaming import GenerationStats, TextAssembler
from gemma2_keras.memory import available_bytes
from gemma2_keras.preprocessing.inputs import to_python

# Rows beyond this gain little: the weights are then read for so many that computing takes longer than reading.
_MOST_ROWS = 32
# Seconds that a stream makes tokens before it gives their text: too short to be seen, long beside what a look costs.
_PAUSE = 0.03


# What `generate` takes beside its own arguments; a sampler of one's own is chosen in `compile`.
SAMPLING_OPTIONS = frozenset(field.name for field in dataclasses.fields(Sampling)) - {"sampler"}


def check_names(function: str, options: Mapping[str, Any], known: Set[str]) -> None:
    """Refuse keyword arguments that nobody reads, as Python itself does."""
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"{function}() got an unexpected keyword argument {unknown[0]!r}.")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of the engine, checked.

    Attributes:
        rows: each prompt's token ids.
        limits: most new tokens of each row.
        stop_ids: tokens that end a row.
        sampling: how tokens are chosen.
        seeds: for each row the seed, and how many equal prompts stand before it.
    """

    rows: list[list[int]]
    limits: list[int]
    stop_ids: tuple[int, ...]
    sampling: Sampling
    seeds: list[tuple[int, int]]

    def part(self, start: int, stop: int) -> Request:
        """The same of some of the rows."""
        names = ("rows", "limits", "seeds")
        return dataclasses.replace(self, **{name: getattr(self, name)[start:stop] for name in names})


@dataclasses.dataclass
class Made:
    """What a row has come to.

    Attributes:
        ids: the tokens made, cut after the one that ended the row.
        text: their text, without control tokens and from before the stop string; empty without a tokenizer.
        reason: why it ended.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    reason: str = "length"


def numbered(rows: list[list[int]], seed: int) -> list[tuple[int, int]]:
    """The seed of each row, with how many equal rows stand before it: what is drawn depends on nothing else."""
    before: Counter[tuple[int, ...]] = Counter()
    seeds = []
    for row in rows:
        seeds.append((seed, before[tuple(row)]))
        before[tuple(row)] += 1
    return seeds


def run(
    engine: Engine,
    request: Request,
    assembler: Callable[[], TextAssembler] | None,
    searched: Callable[[list[list[int]], int], np.ndarray] | None,
    verbose: Any,
) -> tuple[list[Made], GenerationStats]:
    """Continue all rows, as many at a time as memory allows.

    Args:
        engine: that runs them.
        request: what is asked.
        assembler: makes the text of a row; `None` without a tokenizer.
        searched: continues rows by a sampler that searches; `None` for one that does not.
        verbose: 1 shows a progress bar, 0 none; `"auto"` shows one for more rows than are run at once.

    Returns:
        What each row has come to, and what it took.
    """
    made: list[Made] = []
    prompt_tokens, prefill, decode = 0, 0.0, 0.0
    size = rows_at_once(engine.backbone, max(map(sum, zip(map(len, request.rows), request.limits, strict=True))))
    shown = verbose == 1 or (verbose == "auto" and len(request.rows) > size)
    progress = keras.utils.Progbar(len(request.rows), unit_name="prompt") if shown else None
    for start in range(0, len(request.rows), size):
        part = request.part(start, start + size)
        began = time.perf_counter()
        if searched is not None:
            batch, first = _searched(part, assembler, searched), began
        else:
            batch, first = _sampled(engine, part, assembler)
        prefill += first - began
        decode += time.perf_counter() - first
        prompt_tokens += sum(map(len, part.rows))
        made += batch
        if progress is not None:
            progress.update(len(made))
    new = sum(len(row.ids) for row in made)
    return made, GenerationStats(prompt_tokens, new, prefill, decode, tuple(row.reason for row in made))


def _sampled(engine: Engine, request: Request, assembler: Any) -> tuple[list[Made], float]:
    rows = [_Row(request.stop_ids, assembler) for _ in request.rows]
    session = Session(engine, len(rows), max(map(sum, zip(map(len, request.rows), request.limits, strict=True))))
    session.extend(request.rows)
    first = None
    for burst in session.generate(request.limits, request.stop_ids, request.sampling, request.seeds):
        first = first or time.perf_counter()
        for row, tokens in zip(rows, burst, strict=True):
            row.take(tokens)
        session.finish([i for i, row in enumerate(rows) if row.ended])
    return [row.made() for row in rows], first or time.perf_counter()


def _searched(request: Request, assembler: Any, searched: Callable) -> list[Made]:
    made = []
    tokens = searched(request.rows, max(request.limits))
    for found, limit in zip(tokens.tolist(), request.limits, strict=True):
        row = _Row(request.stop_ids, assembler)
        row.take(found[:limit])
        made.append(row.made())
    return made


class _Row:
    """One row while it is made."""

    def __init__(self, stop_ids: tuple[int, ...], assembler: Callable[[], TextAssembler] | None) -> None:
        self._stop_ids = stop_ids
        self._assembler = assembler() if assembler else None
        self._made = Made()
        self.ended = False

    def take(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if self.ended:
                return
            self._made.ids.append(token)
            if self._assembler is not None:
                self._made.text += self._assembler.push(token)
                self.ended = self._assembler.reason is not None
            elif token in self._stop_ids:
                self._made.reason, self.ended = "stop_token", True

    def made(self) -> Made:
        if self._assembler is not None:
            self._made.text += self._assembler.finish()
            self._made.reason = self._assembler.reason or "length"
        return self._made


def streamed(
    session: Session, request: Request, assembler: TextAssembler, began: float, prompt_tokens: int
) -> Generator[str | GenerationStats]:
    """The text of a session of one row, piece by piece, then what it took; the session holds the prompt already.

    Args:
        session: with the prompt run.
        request: of one row.
        assembler: of its text.
        began: when the prompt began to run, by `time.perf_counter`.
        prompt_tokens: how many of its tokens were run.
    """
    first, count = None, 0
    made = session.generate(request.limits, request.stop_ids, request.sampling, request.seeds, pause=_PAUSE)
    for (tokens,) in made:
        first = first or time.perf_counter()
        for token in tokens:
            if assembler.reason is None:
                count += 1
                if piece := assembler.push(token):
                    yield piece
        if assembler.reason is not None:
            break
    if piece := assembler.finish():
        yield piece
    first = first or time.perf_counter()
    reasons = (assembler.reason or "length",)
    yield GenerationStats(prompt_tokens, count, first - began, time.perf_counter() - first, reasons)


def rows_at_once(backbone: Any, length: int) -> int:
    """How many rows of `length` tokens the memory that is left can hold, beside what else the machine does."""
    available = available_bytes()
    if available is None:
        return _MOST_ROWS
    config = backbone.config
    one = cache_bytes(config, 1, length, backbone.compute_dtype) + 16 * config.vocabulary_size
    return max(1, min(_MOST_ROWS, available // 2 // one))


def limits_of(
    rows: list[list[int]], context: int, sequence_length: int | None, max_length: int | None, max_new_tokens: int | None
) -> list[int]:
    """How many tokens each row may get.

    Args:
        rows: the prompts' token ids.
        context: most tokens that the model is made for.
        sequence_length: what bounds the whole where nothing was asked for; `None` is the context.
        max_length: tokens of prompt and continuation that were asked for.
        max_new_tokens: tokens of the continuation that were asked for.

    Raises:
        InputError: if a limit is over the context, or a prompt is empty or leaves no room.
    """
    if max_length is not None and max_length > context:
        raise InputError(f"`max_length` is {max_length}, more than the model's context of {context} tokens.")
    longest = context if max_length is None else int(max_length)
    if max_length is None and max_new_tokens is None and sequence_length is not None:
        # Asked for a number of new tokens, only the context bounds the whole.
        longest = min(sequence_length, context)
    for i, row in enumerate(rows):
        if not row:
            raise InputError(f"Prompt {i} has no tokens: its padding mask is all zero.")
        if len(row) >= longest:
            raise InputError(
                f"Prompt {i} has {len(row)} tokens, which leaves no room within {longest}. Shorten the prompt"
                + (
                    ", or give `max_new_tokens` or a larger `max_length`."
                    if longest < context
                    else f"; the context is {context} tokens."
                )
            )
    room = [longest - len(row) for row in rows]
    return room if max_new_tokens is None else [min(left, int(max_new_tokens)) for left in room]


def check_lengths(max_length: Any, max_new_tokens: Any) -> None:
    """Refuse limits that are no whole numbers above 0, and both at once.

    Raises:
        InputError: which one, and what is allowed.
    """
    for name, value in (("max_length", max_length), ("max_new_tokens", max_new_tokens)):
        if value is not None and (not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1):
            raise InputError(f"`{name}` must be a whole number of at least 1; given {value!r}.")
    if max_length is not None and max_new_tokens is not None:
        raise InputError("Give `max_length` or `max_new_tokens`, not both.")


def stop_ids_of(stop_token_ids: Any, tokenizer: Any, vocabulary_size: int) -> tuple[int, ...]:
    """The ids that `stop_token_ids` means.

    Raises:
        InputError: if they are no ids of the vocabulary, or `"auto"` without a tokenizer.
    """
    if stop_token_ids is None:
        return ()
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        if tokenizer is None:
            raise InputError(
                'Without a preprocessor, `stop_token_ids="auto"` has no meaning: give ids, or None to go on to the end.'
            )
        return tokenizer.stop_token_ids
    ids = to_python(stop_token_ids)
    ids = ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f'`stop_token_ids` must be token ids, "auto" or None; given {stop_token_ids!r}.')
    if not all(0 <= i < vocabulary_size for i in ids):
        raise InputError(f"`stop_token_ids` must lie between 0 and {vocabulary_size - 1}; given {stop_token_ids!r}.")
    return tuple(ids)


def stop_strings_of(stop: Any) -> tuple[str, ...]:
    """`stop` as a tuple.

    Raises:
        InputError: if it is no string or list of strings that have characters.
    """
    if stop is None:
        return ()
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(text, str) and text for text in strings):
        raise InputError(f"`stop` must be a string, or a list of strings, with at least one character; given {stop!r}.")
    return tuple(strings)


def check_seed(seed: Any) -> None:
    """Refuse a seed that is no whole number of at least 0."""
    if seed is not None and (not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0):
        raise InputError(f"`seed` must be a whole number of at least 0, or None; given {seed!r}.")


def check_verbose(verbose: Any) -> None:
    """Refuse what is not 0, 1 or "auto"."""
    if verbose not in (0, 1, "auto"):
        raise InputError(f'`verbose` must be 0, 1 or "auto"; given {verbose!r}.')


def arrays_of(rows: list[list[int]], made: list[list[int]], width: int, strip_prompt: bool) -> dict:
    """Rows and what follows them as arrays padded on the right; the mask is true up to each row's end."""
    shape = len(rows), width
    output = {"token_ids": np.zeros(shape, "int32"), "padding_mask": np.zeros(shape, bool)}
    for i, (row, new) in enumerate(zip(rows, made, strict=True)):
        kept = new if strip_prompt else row + new
        output["token_ids"][i, : len(kept)] = kept
        output["padding_mask"][i, : len(kept)] = True
    return output


def rows_of(inputs: dict[str, Any]) -> list[list[int]]:
    """The tokens of `{"token_ids": (B, L), "padding_mask": (B, L)}` at which the mask is true."""
    token_ids = ops.convert_to_numpy(inputs["token_ids"])
    given = ops.convert_to_numpy(inputs["padding_mask"]).astype(bool)
    return [row[mask].tolist() for row, mask in zip(token_ids, given, strict=True)]
