"""Keys and values of past tokens, one pair per layer: what attention sees of it is `update_and_fetch`.

Every row of a batch has a length of its own. The token at position p of a row lies at slot p % slots: a layer that
sees all keeps as many slots as there are tokens, a local layer a ring whose oldest tokens the newest overwrite.
"""

from __future__ import annotations

from typing import Any

from keras import ops

from gemma2_keras.kernels import write_slots
from gemma2_keras.ops.cache import tokens_at_slots


class ChunkCache:
    """One layer's pair while a chunk of several tokens runs, which attends to itself and to what is cached.

    Args:
        past: the (B, slots, K, H) keys and values cached before; `None` if there are none.
    """

    def __init__(self, past: tuple[Any, Any] | None) -> None:
        self._past = past
        self.chunk: tuple[Any, Any] = ()  # type: ignore[assignment]

    def update_and_fetch(self, keys, values):
        """Note the chunk's (B, T, K, H) pair; the cached pair with this one behind it is what is attended to."""
        self.chunk = (keys, values)
        if self._past is None:
            return keys, values
        return tuple(
            ops.concatenate([ops.cast(old, new.dtype), new], axis=1)
            for old, new in zip(self._past, self.chunk, strict=True)
        )


class StepCache:
    """One layer's pair while one token of each row runs, which is written first.

    Args:
        keys: (B, slots, K, H) tensor.
        values: likewise.
        lengths: (B,) int32, tokens of each row before this one.
    """

    def __init__(self, keys: Any, values: Any, lengths: Any) -> None:
        self.keys = keys
        self.values = values
        self._lengths = lengths

    def update_and_fetch(self, keys, values):
        """Write this step's (B, 1, K, H) pair, and attend to the whole buffers."""
        slot = self._lengths % ops.shape(self.keys)[1]
        self.keys = write_slots(self.keys, slot, keys)
        self.values = write_slots(self.values, slot, values)
        return self.keys, self.values


def with_chunk(cached: Any, chunk: Any, lengths: Any, offsets: Any, counts: Any) -> Any:
    """Keys or values with new tokens written behind them.

    Args:
        cached: (B, slots, K, H) tensor.
        chunk: (B', T, K, H) tensor.
        lengths: (B,) int32, tokens of each row before.
        offsets: (B,) int32, where in B' x T the new tokens of each row begin.
        counts: (B,) int32, how many they are.

    Returns:
        (B, slots, K, H) tensor.
    """
    place = tokens_at_slots(lengths + counts, ops.shape(cached)[1]) - lengths[:, None]
    # A slot without a token yet has the position -1, and so a place before the chunk.
    new = place >= 0
    flat = ops.reshape(chunk, (-1, *chunk.shape[2:]))
    taken = ops.take(flat, ops.where(new, offsets[:, None] + place, 0), axis=0)
    return ops.where(new[:, :, None, None], ops.cast(taken, cached.dtype), cached)
