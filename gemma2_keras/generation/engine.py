"""Prefill and decoding steps as pure functions over token ids and an explicit cache; every row has its own length.

A cache is a dictionary whose every leaf has the batch as its first axis, so that rows can be gathered:

    "layers"   for each layer its (keys, values), (B, slots, K, H) each; token p of a row lies at slot p % slots
    "lengths"  (B,) int32, tokens of each row
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from gemma2_keras import sizes
from gemma2_keras.config import Gemma2Config
from gemma2_keras.layers.cache import ChunkCache, StepCache, with_chunk
from gemma2_keras.layers.lean import lean
from gemma2_keras.ops.cache import tokens_at_slots

Cache = dict[str, Any]

CHUNK = sizes.CHUNK
SPARE = sizes.SPARE


def slot_counts(config: Gemma2Config, length: int) -> list[int]:
    """Slots of each layer in a cache for rows of up to `length` tokens: a local layer needs a ring of its window."""
    return sizes.slot_counts(config, length, SPARE)


def cache_bytes(config: Gemma2Config, rows: int, length: int, dtype: str) -> int:
    """Size of the cache of `rows` rows of up to `length` tokens, as `sizes.cache_bytes`."""
    return sizes.cache_bytes(config, rows, length, dtype, SPARE)


def empty_cache(backbone: Any, rows: int, length: int) -> Cache:
    """A cache for `rows` rows of up to `length` tokens each."""
    config = backbone.config
    shape = (config.num_key_value_heads, config.head_dim)
    layers = [
        tuple(ops.zeros((rows, slots, *shape), backbone.compute_dtype) for _ in range(2))
        for slots in slot_counts(config, length)
    ]
    return {"layers": layers, "lengths": ops.zeros((rows,), "int32")}


def chunk(
    backbone: Any, token_ids: Any, positions: Any, segments: Any = None, past: Cache | None = None
) -> tuple[Any, list[tuple[Any, Any]]]:
    """Run several tokens of each row behind what is cached, which stays as it is.

    Several prompts can stand in one row as segments that do not see one another: short prompts are so run at once
    without padding.

    Args:
        backbone: a `Gemma2Backbone`.
        token_ids: (B, T) int32.
        positions: (B, T) int32 position of each token in its own prompt; `PADDING` where there is none.
        segments: (B, T) int32, tokens see those of their own number; `None` if each row is one prompt.
        past: cache of B rows that the tokens of segment 0 continue; `None` if nothing came before.

    Returns:
        (B, T, D) hidden states, and each layer's (B, T, K, H) keys and values.
    """
    pasts: list[Any] = [None] * backbone.config.num_layers
    keys, key_segments = [positions] * 2, [segments] * 2
    if past is not None:
        pasts = past["layers"]
        cached = _positions_of_slots(past["lengths"], pasts)
        keys = [ops.concatenate([old, positions], axis=1) for old in cached]
        if segments is not None:
            key_segments = [ops.concatenate([ops.zeros_like(old), segments], axis=1) for old in cached]
    context = backbone.sequence_context.of_positions(positions, *keys)
    if segments is not None:
        context = context.within_segments(segments, *key_segments)
    caches = [ChunkCache(pair) for pair in pasts]
    hidden = _run(backbone, token_ids, context, caches)
    return hidden, [layer.chunk for layer in caches]


def write_chunk(cache: Cache, chunks: list[tuple[Any, Any]], offsets: Any, counts: Any) -> Cache:
    """Write what `chunk` made behind the tokens of each row.

    Args:
        cache: of B rows, with room for it.
        chunks: each layer's (B', T, K, H) keys and values.
        offsets: (B,) int32, where in B' x T the tokens of each row begin.
        counts: (B,) int32, how many they are.
    """
    lengths = cache["lengths"]
    layers = [
        tuple(with_chunk(old, new, lengths, offsets, counts) for old, new in zip(pair, made, strict=True))
        for pair, made in zip(cache["layers"], chunks, strict=True)
    ]
    return {"layers": layers, "lengths": lengths + counts}


def decode_step(backbone: Any, token_ids: Any, cache: Cache) -> tuple[Any, Any, Cache]:
    """Run one token of each row.

    Args:
        backbone: a `Gemma2Backbone`.
        token_ids: (B,) int32.
        cache: with room for it.

    Returns:
        (B, V) float32 logits of the next token, (B, D) hidden states, and the cache with this token in it.
    """
    lengths = cache["lengths"]
    everywhere, nearby = _positions_of_slots(lengths + 1, cache["layers"])
    context = backbone.sequence_context.of_positions(lengths[:, None], everywhere, nearby)
    caches = [StepCache(keys, values, lengths) for keys, values in cache["layers"]]
    hidden = _run(backbone, token_ids[:, None], context, caches)[:, 0]
    cache = {"layers": [(layer.keys, layer.values) for layer in caches], "lengths": lengths + 1}
    return backbone.token_embedding(hidden, reverse=True), hidden, cache


def roll_back(cache: Cache, lengths: Any) -> Cache:
    """The cache as it was when its rows had the given (B,) lengths.

    A ring forgets what it overwrites: more than `SPARE` tokens can be taken back only while none was overwritten.
    `can_roll_back` tells.
    """
    return {**cache, "lengths": ops.cast(lengths, "int32")}


def can_roll_back(config: Gemma2Config, slots: int, length: int, to: int) -> bool:
    """Whether a row of `length` tokens, in a cache whose local layers have `slots` slots, can return to `to` tokens."""
    return 0 <= to <= length and (length <= slots or length - to <= slots - config.sliding_window_size + 1)


def fork(cache: Cache, rows: Any) -> Cache:
    """A cache of the given (B',) rows of this one, each as often as it is named."""
    return keras.tree.map_structure(lambda x: ops.take(x, rows, axis=0), cache)


def _positions_of_slots(lengths: Any, layers: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    """(B, S) positions of the tokens in the buffers of a global and of a local layer (of which one may not exist)."""
    everywhere, nearby = (layers[layer % len(layers)][0] for layer in (1, 0))
    return tokens_at_slots(lengths, ops.shape(everywhere)[1]), tokens_at_slots(lengths, ops.shape(nearby)[1])


def _run(backbone: Any, token_ids: Any, context: Any, caches: list) -> Any:
    x = backbone.token_embedding(token_ids)
    with lean(backbone):
        for layer, cache in zip(backbone.transformer_layers, caches, strict=True):
            x = layer(x, context=context, cache=cache)
        return backbone.layer_norm(x)
