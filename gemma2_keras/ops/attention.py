"""Grouped-query attention with soft-capped scores."""

from keras import ops

# Below any soft-capped score, and finite: a padding query, which sees nothing, averages instead of dividing by zero.
MASKED = -1e30


def soft_cap(x, cap):
    """`cap * tanh(x / cap)`: nearly `x` when small, never beyond `cap`. `cap=None` returns `x`.

    Source: Gemma 2 (https://arxiv.org/abs/2408.00118), section 2.

    >>> float(soft_cap(1000.0, 50.0))
    50.0
    """
    return x if cap is None else ops.tanh(x / cap) * cap


def attention(query, key, value, mask, scale, cap):
    """Attend from each query head to the keys and values of its group.

    Args:
        query: (B, T, N, H) float tensor.
        key: (B, S, K, H) float tensor; query head n reads key head n // (N / K).
        value: (B, S, K, H) float tensor.
        mask: (B, T, S) bool tensor, true where a key may be seen.
        scale: factor on the scores.
        cap: soft cap on the scaled scores, before the mask; `None` for none.

    Returns:
        (B, T, N, H) tensor of the dtype of `query`. Scores, cap and softmax are float32.
    """
    _, length, heads, size = query.shape
    key_heads = key.shape[2]
    # -1 stands for the batch, which may be unknown while a graph is traced; the length is not known then either.
    length = ops.shape(query)[1] if length is None else length
    grouped = ops.reshape(query, (-1, length, key_heads, heads // key_heads, size))
    scores = ops.cast(ops.einsum("btkgh,bskh->bkgts", grouped, key), "float32") * scale
    scores = ops.where(mask[:, None, None], soft_cap(scores, cap), MASKED)
    # Keras takes a softmax over a single key, which is 1, for a mistake and warns of it.
    weights = ops.cast(ops.softmax(scores, axis=-1) if key.shape[1] != 1 else ops.ones_like(scores), query.dtype)
    mixed = ops.einsum("bkgts,bskh->btkgh", weights, value)
    return ops.reshape(mixed, (-1, length, heads, size))
