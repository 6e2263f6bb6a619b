"""Rows of token ids that grow: prompts are run, tokens are made, and either goes on where the last call stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from gemma2_keras.errors import InputError
from gemma2_keras.generation import engine, loop
from gemma2_keras.generation.native import NativeModel, is_supported
from gemma2_keras.generation.pace import Pace
from gemma2_keras.generation.processors import checked_tokens, processed, require_choice, require_numbers
from gemma2_keras.generation.programs import Engine
from gemma2_keras.generation.sampling import GREEDY, Sampling, adjusted, kept, noise
from gemma2_keras.kernels import STATIC_SHAPES
from gemma2_keras.ops.masks import PADDING
from gemma2_keras.sizes import bucket

# Tokens made between two looks of the caller: so many that what each look costs is not noticed.
BURST = 8
# Most prompts that are run as one.
_SEGMENTS = 64


class Session:
    """The tokens of some rows, and the cache of those that were run.

    Args:
        programs: the engine that runs them.
        rows: how many rows.
        length: most tokens that a row may come to hold.

    Attributes:
        ids: each row's token ids, those that were given and those that were made.
        prefilled: how many tokens `extend` has run, all rows together.

    Raises:
        InputError: if `length` is more than the model's context.
    """

    def __init__(self, programs: Engine, rows: int, length: int) -> None:
        backbone = programs.backbone
        if length > backbone.config.context_length:
            raise InputError(f"`length` is {length}; the model's context is {backbone.config.context_length} tokens.")
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.prefilled = 0
        self._programs = programs
        self._room = length
        self._native = NativeModel(backbone) if is_supported(backbone) else None
        size = bucket(length) if STATIC_SHAPES else length
        if self._native is None:
            self._cache = engine.empty_cache(backbone, rows, size)
        else:
            self._cache = self._native.empty_cache(rows, size)
        # Tokens of each row in the cache, and the state after the last of its tokens where that is known.
        self._cached = [0] * rows
        self._states: list[Any] = [None] * rows
        # The most tokens of each row that its buffers have held: what the rings have overwritten depends on it.
        self._reached = [0] * rows
        self._ended: set[int] = set()

    # Given tokens

    def extend(self, rows: Sequence[Sequence[int]]) -> None:
        """Append tokens to each row, and run them with those that were made last.

        Raises:
            InputError: if a row would come to hold more than there is room for; nothing has changed then.
        """
        for i, (row, new) in enumerate(zip(self.ids, rows, strict=True)):
            if len(row) + len(new) > self._room:
                raise InputError(f"Row {i} would hold {len(row) + len(new)} tokens; there is room for {self._room}.")
        for row, new in zip(self.ids, rows, strict=True):
            row.extend(int(token) for token in new)
        for row, ids in enumerate(self.ids):
            # A row that lost tokens runs its last one again, for its state.
            if self._states[row] is None and self._cached[row] == len(ids) > 0:
                self._take_back(row, len(ids) - 1)
        self._set_lengths()
        waiting = [(row, cached, len(self.ids[row])) for row, cached in enumerate(self._cached)]
        for segments in _packed([part for part in waiting if part[1] < part[2]]):
            self._run(segments)
        self.prefilled += sum(end - start for _, start, end in waiting)

    def roll_back(self, lengths: Sequence[int]) -> None:
        """Forget all but the first tokens of each row.

        Where the rings of the local layers have lost what would be seen again, the rest of the row is run anew.

        Args:
            lengths: how many tokens of each row stay, at most those that it has.
        """
        self._forget(lengths)
        self.extend([[]] * len(self.ids))

    def _forget(self, lengths: Sequence[int]) -> None:
        for row, length in enumerate(lengths):
            if length < len(self.ids[row]):
                del self.ids[row][length:]
                self._states[row] = None
                self._take_back(row, min(length, self._cached[row]))

    def _take_back(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of a row in the cache, or none if its rings have lost what they would see."""
        config, slots = self._programs.backbone.config, int(self._cache["layers"][0][0].shape[1])
        self._reached[row] = max(self._reached[row], self._cached[row])
        kept = engine.can_roll_back(config, slots, self._reached[row], length)
        self._cached[row] = length if kept else 0
        if not kept:
            self._reached[row] = 0

    def become(self, rows: Sequence[Sequence[int]]) -> None:
        """Make the rows hold these tokens, running only what differs from the tokens they hold."""
        kept = [_common(old, new) for old, new in zip(self.ids, rows, strict=True)]
        for i, new in enumerate(rows):
            if len(new) > self._room:
                raise InputError(f"Row {i} would hold {len(new)} tokens; there is room for {self._room}.")
        self._forget(kept)
        self.extend([new[length:] for new, length in zip(rows, kept, strict=True)])

    def fork(self, rows: Sequence[int]) -> Session:
        """A session of the given rows of this one, each as often as it is named; both go on by themselves."""
        copy = Session.__new__(Session)
        copy.__dict__ = {**self.__dict__, "prefilled": 0}
        copy.ids = [list(self.ids[row]) for row in rows]
        copy._cached = [self._cached[row] for row in rows]
        copy._states = [self._states[row] for row in rows]
        copy._reached = [self._reached[row] for row in rows]
        copy._ended = set()
        index = np.asarray(rows, "int32")
        if self._native is None:
            copy._cache = engine.fork(self._cache, ops.convert_to_tensor(index))
        else:
            copy._cache = keras.tree.map_structure(lambda x: x[index], self._cache)
        return copy

    def _run(self, segments: list[tuple[int, int, int]]) -> None:
        """Run tokens [start, end) of some rows one behind the other; only the first may continue what is cached."""
        size = sum(end - start for _, start, end in segments)
        width = min(bucket(size), engine.CHUNK) if STATIC_SHAPES else size
        # The number of segments is no shape: there is always room for so many.
        last = np.zeros(_SEGMENTS, "int32")
        token_ids, numbers = np.zeros((2, 1, width), "int32")
        positions = np.full((1, width), PADDING, "int32")
        offsets, counts = np.zeros((2, len(self.ids)), "int32")
        at = 0
        for number, (row, start, end) in enumerate(segments):
            here = slice(at, at + end - start)
            token_ids[0, here] = self.ids[row][start:end]
            positions[0, here] = np.arange(start, end)
            numbers[0, here] = number
            offsets[row], counts[row] = at, end - start
            at = here.stop
            last[number] = at - 1
        row, start, _ = segments[0]
        past = (self._past(row, start),) if start else ()
        states, chunks = self._programs.chunk(token_ids, positions, numbers, last, *past)
        if self._native is None:
            self._cache = self._programs.write(self._cache, chunks, offsets, counts)
        else:
            self._native.write(self._cache, [tuple(map(_numpy, pair)) for pair in chunks], offsets, counts)
        for number, (row, _, end) in enumerate(segments):
            self._states[row] = states[number]
            self._cached[row] = end

    def _past(self, row: int, length: int) -> Any:
        """The cache of one row that has `length` tokens in it."""
        slots = bucket(length) if STATIC_SHAPES else length
        layers = [tuple(x[row : row + 1, :slots] for x in pair) for pair in self._cache["layers"]]
        return {"layers": layers, "lengths": np.asarray([length], "int32")}

    def _set_lengths(self) -> None:
        lengths = np.asarray(self._cached, "int32")
        self._cache["lengths"] = lengths if self._native is not None else ops.convert_to_tensor(lengths)

    def logits(self) -> np.ndarray:
        """(B, V) float32 logits of the token that follows each row."""
        if self._native is not None:
            return self._native.logits(np.stack([_numpy(state) for state in self._states]))
        return _numpy(self._programs.logits(ops.stack(self._states)))

    # Made tokens

    def generate(
        self,
        limits: Sequence[int],
        stop_ids: Sequence[int] = (),
        sampling: Sampling = GREEDY,
        seeds: Sequence[tuple[int, int]] | None = None,
        burst: int = BURST,
        pause: float = math.inf,
    ) -> Iterator[list[list[int]]]:
        """Make tokens behind each row, a few at a time.

        Args:
            limits: most tokens of each row.
            stop_ids: tokens that end a row; they are made, too.
            sampling: how tokens are chosen.
            seeds: for each row its seed and how many rows with the same seed and prompt stand before it; read where
                chance decides.
            burst: most tokens of a row at a time.
            pause: about the most seconds to make tokens before they are given; at least one is made.

        Yields:
            The next tokens of each row; a row that has ended gets none. Between them `finish` may end rows; a caller
            who has seen enough leaves.
        """
        for row, limit in enumerate(limits):
            if not self.ids[row]:
                raise InputError(f"Row {row} has no tokens to continue.")
            if len(self.ids[row]) + limit > self._room:
                raise InputError(
                    f"Row {row} has {len(self.ids[row])} tokens and room for {self._room}, not {limit} more."
                )
        self.extend([[]] * len(self.ids))
        plain = sampling.is_greedy and not sampling.uses and not sampling.logits_processors
        run = self._greedy if self._native is not None and plain else self._sampled
        self._ended.clear()
        for made in run(np.asarray(limits, "int32"), tuple(stop_ids), Pace(burst, pause), sampling, seeds):
            for row, tokens in enumerate(made):
                if tokens:
                    self.ids[row] += tokens
                    # The last token was chosen and not run.
                    self._cached[row] = len(self.ids[row]) - 1
                    self._states[row] = None
            yield made

    def finish(self, rows: Sequence[int]) -> None:
        """End rows that `generate` is making."""
        self._ended.update(rows)

    def _greedy(self, left: np.ndarray, stop_ids: tuple[int, ...], pace: Pace, *_: Any) -> Iterator[list[list[int]]]:
        """With the kernels: choosing the likeliest token is part of the step."""
        assert self._native is not None
        finished = (left <= 0).astype("uint8")
        logits = self.logits()
        require_numbers(logits, left > 0)
        tokens = logits.argmax(-1).astype("int32")
        made = [[] if end else [int(token)] for token, end in zip(tokens, finished, strict=True)]
        left = left - (finished == 0)
        finished |= np.isin(tokens, stop_ids) | (left <= 0)
        yield made
        while True:
            finished[list(self._ended)] = 1
            if finished.all():
                return
            before = left.copy()
            began = time.perf_counter()
            steps = min(pace.steps, int(left[finished == 0].max()))
            new = self._native.decode(self._cache, tokens, steps, left, finished, stop_ids)
            pace.note(new.shape[1], time.perf_counter() - began)
            if self._programs.settles(new.shape[1]):
                self._native.settle()
            yield [row[:count].tolist() for row, count in zip(new, before - left, strict=True)]

    def _sampled(
        self, left: np.ndarray, stop_ids: tuple[int, ...], pace: Pace, sampling: Sampling, seeds: Any
    ) -> Iterator[list[list[int]]]:
        """Any way of choosing, on any backend."""
        values, uses = sampling.values(self._programs.backbone.config.vocabulary_size), sampling.uses
        # Room for some stop tokens, so that their number is no shape.
        stops = np.pad(np.asarray(stop_ids, "int32"), (0, -len(stop_ids) % 4 or 4 * (not stop_ids)), constant_values=-1)
        chance = np.zeros((len(left), int(left.max(initial=0)) + pace.most), "float32")
        if "noise" in uses:
            for row, (ids, (seed, copy)) in enumerate(zip(self.ids, seeds or [(0, 0)] * len(left), strict=True)):
                chance[row] = noise(seed, copy, ids, chance.shape[1])
        state = self._first_state(left, sampling)
        by_hand = bool(sampling.logits_processors) or sampling.sampler is not None
        done = 1
        logits = self.logits()
        require_numbers(logits, left > 0)
        state, made = self._picked(logits, state, chance[:, 0], values, stops, sampling)
        yield [row[:1].tolist() if limit > 0 else [] for row, limit in zip(made, left, strict=True)]
        while True:
            if self._ended:
                ended = np.isin(np.arange(len(left)), list(self._ended))
                state["finished"] = ops.logical_or(state["finished"], ops.convert_to_tensor(ended))
            if _numpy(state["finished"]).all():
                return
            before = _numpy(state["left"])
            if by_hand or self._native is not None:
                state, made = self._picked(self._stepped(state), state, chance[:, done], values, stops, sampling)
                done += 1
            else:
                began = time.perf_counter()
                some, steps = chance[:, done : done + pace.most], np.asarray(pace.steps, "int32")
                made, run, state, self._cache = self._programs.burst(
                    self._cache, state, steps, some, values, stops, uses=uses
                )
                run = int(_numpy(run))
                pace.note(run, time.perf_counter() - began)
                done += run
            counts = before - _numpy(state["left"])
            yield [row[:count].tolist() for row, count in zip(_numpy(made), counts, strict=True)]

    def _first_state(self, left: np.ndarray, sampling: Sampling) -> loop.State:
        state: loop.State = {"tokens": np.zeros(len(left), "int32"), "left": left, "finished": left <= 0}
        if sampling.remembers:
            size = self._programs.backbone.config.vocabulary_size
            counts = np.stack([np.bincount(ids, minlength=size) for ids in self.ids]).astype("int32")
            state |= {"prompt_counts": counts, "made_counts": np.zeros_like(counts)}
        return {name: ops.convert_to_tensor(value) for name, value in state.items()}

    def _stepped(self, state: loop.State) -> Any:
        """(B, V) logits once the chosen tokens are run."""
        if self._native is not None:
            if self._programs.settles(1):
                self._native.settle()
            return self._native.step(self._cache, _numpy(state["tokens"]), _numpy(state["finished"]).astype("uint8"))
        logits, self._cache = self._programs.step(state, self._cache)
        return logits

    def _picked(
        self, logits: Any, state: loop.State, chance: np.ndarray, values: dict, stops: np.ndarray, sampling: Sampling
    ) -> tuple[loop.State, np.ndarray]:
        """The state with a token of each row chosen, and (B, 1) of those."""
        if sampling.logits_processors:
            going = np.flatnonzero(~_numpy(state["finished"]))
            for processor in sampling.logits_processors:
                logits = processed(processor, [list(row) for row in self.ids], _numpy(logits), going)
            require_choice(logits, values, going)
        if sampling.sampler is None:
            state = self._programs.pick(logits, state, chance, values, stops, uses=sampling.uses)
        else:
            values = {name: ops.convert_to_tensor(value) for name, value in values.items()}
            logits = adjusted(ops.convert_to_tensor(logits), values, *loop.counts(state), sampling.uses)
            logits = kept(logits, values, sampling.uses)
            tokens = sampling.sampler.get_next_token(sampling.sampler.compute_probabilities(logits))
            state = self._programs.note(checked_tokens(sampling.sampler, tokens, tuple(logits.shape)), state, stops)
        return state, _numpy(state["tokens"])[:, None]


def _packed(waiting: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """(row, start, end) parts as chunks of at most `CHUNK` tokens; one that continues a row begins its chunk."""
    some: list[tuple[int, int, int]] = []
    room = engine.CHUNK
    for row, start, end in waiting:
        while start < end:
            if some and (start or not room or len(some) == _SEGMENTS):
                yield some
                some, room = [], engine.CHUNK
            stop = min(end, start + room)
            some.append((row, start, stop))
            room -= stop - start
            start = stop
    if some:
        yield some


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def _numpy(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else ops.convert_to_numpy(x)
