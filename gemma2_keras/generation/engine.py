"""Prefill and decoding steps as pure functions over token ids and an explicit cache.

Prompts are aligned on the right: row b has `padding[b]` empty places before its first token, so that the token at
index i of the buffer has position `i - padding[b]` in its row, and the next token of every row is written at one index.
A ragged batch thus neither repeats prompt tokens nor shifts positions. Local layers keep a ring of their window.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from gemma2_keras.layers.cache import DecodeCache, PrefillCache, tokens_in_ring
from gemma2_keras.ops.masks import PADDING

# What is carried from step to step; every leaf has the batch as its first axis, so that beams can be gathered.
#   "layers": for each layer its (keys, values), (B, slots, K, H) each
#   "padding": (B,) int32, empty places before each row's first token
Cache = dict[str, Any]


def prefill(backbone: Any, token_ids: Any, padding_mask: Any, length: int) -> tuple[Any, Any, Cache]:
    """Run the prompts once and lay out their keys and values for decoding.

    Args:
        backbone: a `Gemma2Backbone`.
        token_ids: (B, T) int32 prompts, aligned on the right.
        padding_mask: (B, T), true at the prompts' tokens.
        length: tokens that the buffer shall hold in all, prompts included.

    Returns:
        (B, V) float32 logits of the next token, (B, T, D) hidden states, and the cache.
    """
    context = backbone.sequence_context(padding_mask)
    caches = [PrefillCache() for _ in backbone.transformer_layers]
    hidden = _run(backbone, token_ids, context, caches)
    slots = _slots(backbone, length)
    cache = {
        "layers": [layer.laid_out(count) for layer, count in zip(caches, slots, strict=True)],
        "padding": ops.sum(1 - ops.cast(padding_mask, "int32"), axis=1),
    }
    return backbone.token_embedding(hidden[:, -1], reverse=True), hidden, cache


def decode_step(backbone: Any, token_ids: Any, cache: Cache, index: Any) -> tuple[Any, Any, Cache]:
    """Run one token of each row; running the same index again overwrites it.

    Args:
        backbone: a `Gemma2Backbone`.
        token_ids: (B,) int32 tokens at `index` of the buffer.
        cache: from `prefill` or an earlier step.
        index: int scalar, or scalar tensor.

    Returns:
        (B, V) float32 logits of the next token, (B, 1, D) hidden states, and the cache with this token in it.
    """
    padding = cache["padding"][:, None]
    positions = index - padding
    local, other = (
        _key_positions(index, cache["layers"][layer % len(cache["layers"])][0].shape[1], padding) for layer in (0, 1)
    )
    context = backbone.sequence_context.of_positions(positions, other, local)
    caches = [DecodeCache(keys, values, index) for keys, values in cache["layers"]]
    hidden = _run(backbone, token_ids[:, None], context, caches)
    cache = {"layers": [(layer.keys, layer.values) for layer in caches], "padding": cache["padding"]}
    return backbone.token_embedding(hidden[:, -1], reverse=True), hidden, cache


def _run(backbone: Any, token_ids: Any, context: Any, caches: list) -> Any:
    x = backbone.token_embedding(token_ids)
    for layer, cache in zip(backbone.transformer_layers, caches, strict=True):
        x = layer(x, context=context, cache=cache)
    return backbone.layer_norm(x)


def _slots(backbone: Any, length: int) -> list[int]:
    """Slots of each layer's buffer: its window at most, if it is local."""
    config = backbone.config
    window = min(length, config.sliding_window_size)
    return [window if config.is_local(i) else length for i in range(config.num_layers)]


def _key_positions(index: Any, slots: int, padding: Any) -> Any:
    """(B, slots) position of the token in each slot; negative where there is none."""
    tokens = tokens_in_ring(ops.cast(index, "int32"), ops.arange(slots, dtype="int32"))[None]
    return ops.where(tokens >= 0, ops.maximum(tokens - padding, PADDING), PADDING)
