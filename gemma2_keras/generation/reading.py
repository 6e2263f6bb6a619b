"""Given tokens through the model, all of their states: for what is asked of every token, and not of the next alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma2_keras.generation import engine
from gemma2_keras.generation.programs import Engine
from gemma2_keras.kernels import STATIC_SHAPES
from gemma2_keras.ops.cross_entropy import tokens_at_once
from gemma2_keras.ops.masks import PADDING
from gemma2_keras.sizes import bucket

_Tokens = Sequence[int] | np.ndarray


class Read(NamedTuple):
    """Some tokens that were run, few enough that all logits of them can be made at once.

    Attributes:
        states: (M, D) tensor, their states after the last norm; behind those of the tokens there may be padding.
        rows: (N,) int array, the row of each of the N <= M tokens.
        places: (N,) int array, its place in that row.
    """

    states: Any
    rows: np.ndarray
    places: np.ndarray


def read(programs: Engine, rows: Sequence[_Tokens]) -> Iterator[Read]:
    """Run rows of tokens, a stretch at a time: memory is that of one stretch and of the longest row's cache.

    Short rows are run side by side, without padding, and do not see one another.

    Args:
        programs: the engine that runs them.
        rows: each row's token ids, at most the model's context.

    Yields:
        Each token once, the longest rows first.
    """
    size = tokens_at_once(programs.backbone.config.vocabulary_size)
    for states, members, places in _stretches(programs, rows):
        for start in range(0, len(members), size):
            some = slice(start, start + size)
            yield Read(states[some], members[some], places[some])


def _stretches(programs: Engine, rows: Sequence[_Tokens]) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    together: list[int] = []
    taken = 0
    for row in sorted(range(len(rows)), key=lambda row: -len(rows[row])):
        length = len(rows[row])
        if length > engine.CHUNK:
            yield from _one_long(programs, rows, row)
            continue
        if taken + length > engine.CHUNK:
            yield _side_by_side(programs, rows, together)
            together, taken = [], 0
        if length:
            together.append(row)
            taken += length
    if together:
        yield _side_by_side(programs, rows, together)


def _one_long(programs: Engine, rows: Sequence[_Tokens], row: int) -> Iterator[tuple[Any, np.ndarray, np.ndarray]]:
    """One row, a chunk at a time over a cache."""
    length = len(rows[row])
    cache = engine.empty_cache(programs.backbone, 1, bucket(length) if STATIC_SHAPES else length)
    for start in range(0, length, engine.CHUNK):
        places = np.arange(start, min(length, start + engine.CHUNK))
        tokens = np.asarray(rows[row][start : start + engine.CHUNK])
        past = ()
        if start:
            slots = bucket(start) if STATIC_SHAPES else start
            layers = [tuple(x[:, :slots] for x in pair) for pair in cache["layers"]]
            past = ({"layers": layers, "lengths": np.asarray([start], "int32")},)
        states, chunks = _run(programs, tokens, places, np.zeros_like(places), *past)
        yield states, np.full_like(places, row), places
        if places[-1] + 1 < length:
            cache = programs.write(cache, chunks, np.zeros(1, "int32"), np.asarray([len(places)], "int32"))


def _side_by_side(programs: Engine, rows: Sequence[_Tokens], members: list[int]) -> tuple[Any, np.ndarray, np.ndarray]:
    """Several rows as segments of one."""
    lengths = [len(rows[row]) for row in members]
    places = np.concatenate([np.arange(length) for length in lengths])
    numbers = np.repeat(np.arange(len(members)), lengths)
    states, _ = _run(programs, np.concatenate([np.asarray(rows[row]) for row in members]), places, numbers)
    return states, np.repeat(members, lengths), places


def _run(programs: Engine, tokens: np.ndarray, positions: np.ndarray, numbers: np.ndarray, *past: Any) -> Any:
    """(width, D) states, and what `engine.write_chunk` writes."""
    count = len(tokens)
    width = min(bucket(count), engine.CHUNK) if STATIC_SHAPES else count

    def padded(values: np.ndarray, value: int) -> np.ndarray:
        return np.pad(values, (0, width - count), constant_values=value).astype("int32")[None]

    everywhere = np.arange(width, dtype="int32")
    return programs.chunk(padded(tokens, 0), padded(positions, PADDING), padded(numbers, 0), everywhere, *past)
