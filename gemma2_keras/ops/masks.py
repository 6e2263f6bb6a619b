"""Positions and attention masks, each made once per step from the padding mask."""

from keras import ops

PADDING = -1


def positions_from_mask(padding_mask):
    """Number the real tokens of each row 0, 1, 2, …; padding, wherever it stands, is -1.

    Args:
        padding_mask: (B, T) tensor, true or 1 at real tokens.

    Returns:
        (B, T) int32 tensor.

    Example:

    >>> import numpy as np
    >>> np.asarray(positions_from_mask(np.array([[0, 1, 1, 0]]))).tolist()
    [[-1, 0, 1, -1]]
    """
    real = ops.cast(padding_mask, "bool")
    count = ops.cumsum(ops.cast(real, "int32"), axis=1)
    return ops.where(real, count - 1, PADDING)


def causal_mask(query_positions, key_positions, window=None):
    """Which keys each query may see: real ones, not later than itself, and within the window.

    Padding has position -1, so that any padding, a cache slot not yet written, or one already out of date is told by
    its position alone, and rows may have lengths of their own.

    Args:
        query_positions: (B, T) int tensor.
        key_positions: (B, S) int tensor.
        window: number of positions seen, the query's own included; `None` sees all.

    Returns:
        (B, T, S) bool tensor.
    """
    query = query_positions[:, :, None]
    key = key_positions[:, None, :]
    seen = ops.logical_and(key > PADDING, key <= query)
    if window is not None:
        seen = ops.logical_and(seen, query - key < window)
    return seen
