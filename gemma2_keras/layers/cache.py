"""Keys and values of past tokens, one pair per layer: what attention sees of it is `update_and_fetch`."""

from __future__ import annotations

import numpy as np
from keras import ops


class PrefillCache:
    """Notes the keys and values of a whole prompt as they are made, and then lays them out for decoding."""

    def __init__(self) -> None:
        self.keys = None
        self.values = None

    def update_and_fetch(self, keys, values):
        """Keep the (B, T, K, H) keys and values of the prompt, and attend to them alone."""
        self.keys, self.values = keys, values
        return keys, values

    def laid_out(self, slots: int):
        """The pair as (B, slots, K, H) buffers: token t at slot t % slots, the last to write a slot staying."""
        return self._ring(self.keys, slots), self._ring(self.values, slots)

    @staticmethod
    def _ring(x, slots: int):
        length = x.shape[1]
        if length <= slots:
            return ops.pad(x, ((0, 0), (0, slots - length), (0, 0), (0, 0)))
        return ops.take(x, tokens_in_ring(length - 1, np.arange(slots, dtype="int32")), axis=1)


class DecodeCache:
    """One layer's buffers during one decoding step, which writes token `index` at slot `index % slots`.

    Args:
        keys: (B, slots, K, H) tensor.
        values: (B, slots, K, H) tensor.
        index: int scalar tensor, the token's index counted from the start of the buffer of tokens.
    """

    def __init__(self, keys, values, index) -> None:
        self.keys = keys
        self.values = values
        self.index = index

    def update_and_fetch(self, keys, values):
        """Write this step's (B, 1, K, H) pair, and attend to the whole buffers."""
        start = (0, self.index % self.keys.shape[1], 0, 0)
        self.keys = ops.slice_update(self.keys, start, ops.cast(keys, self.keys.dtype))
        self.values = ops.slice_update(self.values, start, ops.cast(values, self.values.dtype))
        return self.keys, self.values


def tokens_in_ring(index, slots):
    """Index of the token at each slot of a ring once token `index` is written; negative where none is yet.

    Args:
        index: int, or int scalar tensor.
        slots: (S,) array or tensor, the numbers 0 to S - 1 of the ring's slots.

    Returns:
        (S,) array or tensor of ints.

    >>> tokens_in_ring(5, np.arange(4)).tolist()
    [4, 5, 2, 3]
    """
    return index - (index - slots) % slots.shape[0]
