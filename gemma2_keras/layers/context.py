"""What all decoder blocks of one step share: rotary tables and the two masks."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
from keras import ops

from gemma2_keras.ops.masks import causal_mask, positions_from_mask, segment_mask
from gemma2_keras.ops.rotary import rotary_tables


class StepContext(NamedTuple):
    """Made once per step, read by every block.

    Attributes:
        cosine: (B, T, 1, H/2) float32 rotary cosines.
        sine: (B, T, 1, H/2) float32 rotary sines.
        global_mask: (B, T, S) bool, what a global layer's queries may see.
        local_mask: (B, T, S') bool, the same for a local layer, whose keys may be others (a ring of recent ones).
    """

    cosine: Any
    sine: Any
    global_mask: Any
    local_mask: Any

    def within_segments(self, segments, global_key_segments, local_key_segments) -> StepContext:
        """The same, each query seeing keys of its own segment alone; (B, T), (B, S) and (B, S') int numbers."""

        def narrowed(mask, key_segments):
            return ops.logical_and(mask, segments[:, :, None] == key_segments[:, None, :])

        return self._replace(
            global_mask=narrowed(self.global_mask, global_key_segments),
            local_mask=narrowed(self.local_mask, local_key_segments),
        )

    def mask(self, local: bool):
        """The mask of a local or of a global layer."""
        return self.local_mask if local else self.global_mask


@keras.saving.register_keras_serializable(package="gemma2_keras")
class SequenceContext(keras.layers.Layer):
    """Padding mask to `StepContext`, for a sequence that is its own keys.

    Args:
        head_dim: size H of a head.
        max_wavelength: base of the rotary wavelengths.
        window: positions seen by a local layer.
        **kwargs: as `keras.layers.Layer` takes them.

    Example:

    >>> import numpy as np
    >>> context = SequenceContext(head_dim=4, max_wavelength=10000.0, window=2)(np.array([[1, 1, 1]]))
    >>> np.asarray(context.local_mask)[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    def __init__(self, head_dim: int, max_wavelength: float, window: int, **kwargs) -> None:
        # The tables stay float32 under every policy.
        super().__init__(autocast=False, **kwargs)
        self.head_dim = head_dim
        self.max_wavelength = max_wavelength
        self.window = window

    def call(self, padding_mask):
        """(B, T) padding mask, whose numbers tell packed examples apart -> `StepContext`."""
        seen = segment_mask(padding_mask)
        positions = positions_from_mask(seen)
        cosine, sine = rotary_tables(positions, self.head_dim, self.max_wavelength)
        near = positions[:, :, None] - positions[:, None, :] < self.window
        return StepContext(cosine, sine, seen, ops.logical_and(seen, near))

    def of_positions(self, positions, global_key_positions, local_key_positions) -> StepContext:
        """The context of queries at `positions` (B, T) over keys at the given (B, S) and (B, S') positions."""
        cosine, sine = rotary_tables(positions, self.head_dim, self.max_wavelength)
        return StepContext(
            cosine,
            sine,
            causal_mask(positions, global_key_positions),
            causal_mask(positions, local_key_positions, self.window),
        )

    def compute_output_spec(self, padding_mask):
        """Shapes and dtypes of the context."""
        batch, length = padding_mask.shape
        # A graph tells tensors apart by identity: one object for two of them would make them one.
        tables = (keras.KerasTensor((batch, length, 1, self.head_dim // 2), "float32") for _ in range(2))
        masks = (keras.KerasTensor((batch, length, length), "bool") for _ in range(2))
        return StepContext(*tables, *masks)

    def get_config(self) -> dict:
        """Constructor arguments."""
        return {
            **super().get_config(),
            "head_dim": self.head_dim,
            "max_wavelength": self.max_wavelength,
            "window": self.window,
        }
