"""Where tokens lie in a buffer whose rows each have a length of their own."""

from keras import ops

from gemma2_keras.ops.masks import PADDING


def tokens_at_slots(lengths, slots):
    """Position of the token at each slot; the token at position p lies at slot p % slots, the newest staying.

    Args:
        lengths: (B,) int32 tensor, tokens of each row.
        slots: number of slots S.

    Returns:
        (B, S) int32 tensor; `PADDING` where there is no token yet.

    >>> import numpy as np
    >>> np.asarray(tokens_at_slots(np.array([6, 2], "int32"), 4)).tolist()
    [[4, 5, 2, 3], [0, 1, -1, -1]]
    """
    newest = ops.cast(lengths, "int32")[:, None] - 1
    token = newest - (newest - ops.arange(slots, dtype="int32")[None]) % slots
    return ops.where(token >= 0, token, PADDING)


def write_slots(buffer, slots, values):
    """Write one value into each row of a buffer.

    Args:
        buffer: (B, S, K, H) tensor, which a kernel may overwrite.
        slots: (B,) int32 tensor, where.
        values: (B, 1, K, H) tensor.

    Returns:
        (B, S, K, H) tensor.
    """
    here = ops.arange(ops.shape(buffer)[1], dtype="int32")[None] == slots[:, None]
    return ops.where(here[:, :, None, None], ops.cast(values, buffer.dtype), buffer)
