"""Beam search and contrastive search, in the loops of KerasHub's samplers."""

from __future__ import annotations

from typing import Any

import keras_hub
import numpy as np
from keras import ops

from gemma2_keras.errors import InputError
from gemma2_keras.generation import engine
from gemma2_keras.ops.masks import PADDING

# Samplers that choose a token from one row of probabilities run in our loop; those that search, in their own.
_ONE_TOKEN = keras_hub.samplers.Sampler


def searches(sampler: Any) -> bool:
    """Whether a sampler runs a loop of its own (beam search, contrastive search)."""
    return type(sampler).__call__ is not _ONE_TOKEN.__call__


def check_sampler(sampler: Any, vocabulary_size: int) -> None:
    """Refuse a sampler whose parameters mean nothing; those that become a `Sampling` are checked there.

    Raises:
        InputError: names the parameter.
    """
    known = keras_hub.samplers

    def require(name: str, allowed: str, holds: Any) -> None:
        value = getattr(sampler, name, None)
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not number or not holds(value):
            raise InputError(f"`{name}` of {type(sampler).__name__} must be {allowed}; given {value!r}.")

    def whole(value: Any, most: int) -> bool:
        return isinstance(value, int | np.integer) and bool(1 <= value <= most)

    if isinstance(sampler, known.BeamSampler):
        require("num_beams", f"a whole number from 1 to {vocabulary_size}", lambda x: whole(x, vocabulary_size))
    if isinstance(sampler, known.ContrastiveSampler):
        require("k", f"a whole number from 1 to {vocabulary_size}", lambda x: whole(x, vocabulary_size))
        require("alpha", "a number from 0 to 1", lambda x: 0 <= x <= 1)
    if hasattr(sampler, "temperature"):
        require("temperature", "a number above 0", lambda x: 0 < x < float("inf"))


def search(
    model: Any,
    sampler: Any,
    token_ids: Any,
    counts: Any,
    *,
    shape: tuple[int, int],
    room: int,
    stop_ids: tuple[int, ...],
) -> Any:
    """Continue prompts with a sampler that searches.

    KerasHub's loops write all rows at one index, so that prompts are aligned on the right there; the cache does not
    know of it, since the length of a row is the index less its empty places.

    Args:
        model: the task, whose variables a traced loop carries.
        sampler: for which `searches` is true.
        token_ids: (B, T) int32; row b's prompt is the first `counts[b]`.
        counts: (B,) int32, at least 1.
        shape: (B, T), which KerasHub's loops must know while they are traced.
        room: tokens to make.
        stop_ids: tokens that end a row.

    Returns:
        (B, room) int32 tokens; what follows a row's first stop id means nothing.
    """
    backbone = model.backbone
    rows, length = shape
    token_ids, counts = ops.reshape(token_ids, shape), ops.reshape(counts, (rows,))
    place = ops.arange(length, dtype="int32")[None]
    positions = ops.where(place < counts[:, None], place, PADDING)
    hidden, chunks = engine.chunk(backbone, token_ids, positions)
    empty = engine.empty_cache(backbone, rows, length + room)
    cache = engine.write_chunk(empty, chunks, ops.arange(rows, dtype="int32") * length, counts)
    padding = length - counts
    # The right-aligned prompt; in its empty places its last token, whose state no similarity to real ones exceeds.
    source = place - padding[:, None]
    real = source >= 0
    source = ops.where(real, source, counts[:, None] - 1)
    prompt = ops.take_along_axis(token_ids, source, axis=1)
    hidden = ops.take_along_axis(hidden, source[:, :, None], axis=1)
    # Everything up to the first new token counts as given, the empty places too.
    given = ops.concatenate([ops.ones_like(real), ops.zeros((rows, room), "bool")], axis=1)

    def following(prompt, cache, index):
        token = ops.slice(prompt, (0, index - 1), (ops.shape(prompt)[0], 1))[:, 0]
        cache = {"layers": cache["layers"], "lengths": ops.cast(index - 1, "int32") - cache["padding"]}
        logits, hidden, after = engine.decode_step(backbone, token, cache)
        return logits, hidden, {**after, "padding": ops.cast(index, "int32") - after["lengths"]}

    tokens = sampler(
        next=following,
        prompt=ops.concatenate([prompt, ops.zeros((rows, room), "int32")], axis=1),
        cache={**cache, "padding": padding},
        index=length,
        mask=given,
        stop_token_ids=stop_ids or None,
        hidden_states=ops.pad(hidden, ((0, 0), (0, room), (0, 0))),
        model=model,
    )
    return tokens[:, length:]
