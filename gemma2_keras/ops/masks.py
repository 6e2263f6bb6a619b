"""Attention masks and positions, each made once per step from the padding mask."""

from keras import ops

PADDING = -1


def segment_mask(padding_mask):
    """Which tokens each token may see: those of its own example, itself and earlier.

    Args:
        padding_mask: (B, T) tensor, 0 at padding, wherever it stands. Its other numbers tell the examples packed into a
            row apart; true counts as 1.

    Returns:
        (B, T, T) bool tensor.

    Example:

    >>> import numpy as np
    >>> np.asarray(segment_mask(np.array([[1, 1, 0, 2]])))[0].astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    """
    segments = ops.cast(padding_mask, "int32")
    index = ops.arange(ops.shape(segments)[1])
    real = ops.not_equal(segments, 0)[:, None, :]
    own = ops.equal(segments[:, :, None], segments[:, None, :])
    return ops.logical_and(ops.logical_and(own, real), index[:, None] >= index)


def positions_from_mask(seen):
    """Number the tokens of each example 0, 1, 2, …; padding is -1.

    Args:
        seen: (B, T, T) bool tensor, as `segment_mask` makes it.

    Returns:
        (B, T) int32 tensor.

    Example:

    >>> import numpy as np
    >>> np.asarray(positions_from_mask(segment_mask(np.array([[0, 1, 1, 0, 1, 2, 2]])))).tolist()
    [[-1, 0, 1, -1, 2, 0, 1]]
    """
    return ops.sum(ops.cast(seen, "int32"), axis=-1) - 1


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
