"""Beam search and contrastive search, in the loops of KerasHub's samplers."""

from __future__ import annotations

from typing import Any

import keras_hub
from keras import ops

from gemma2_keras.generation import engine
from gemma2_keras.ops.masks import PADDING

# Samplers that choose a token from one row of probabilities run in our loop; those that search, in their own.
_ONE_TOKEN = keras_hub.samplers.Sampler


def searches(sampler: Any) -> bool:
    """Whether a sampler runs a loop of its own (beam search, contrastive search)."""
    return type(sampler).__call__ is not _ONE_TOKEN.__call__


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
