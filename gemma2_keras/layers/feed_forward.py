"""The feed-forward branch of a decoder block."""

from __future__ import annotations

import keras

from gemma2_keras.kernels import gated_gelu
from gemma2_keras.layers.lean import LeanLayer
from gemma2_keras.layers.linear import Linear


@keras.saving.register_keras_serializable(package="gemma2_keras")
class FeedForward(LeanLayer):
    """`down(gelu(gate(x)) * up(x))`.

    Args:
        intermediate_dim: width F of the gate and of the up projection, each.
        **kwargs: as `keras.layers.Layer` takes them.

    Example:

    >>> import numpy as np
    >>> tuple(FeedForward(7)(np.ones((2, 3, 4), "float32")).shape)
    (2, 3, 4)
    """

    def __init__(self, intermediate_dim: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.intermediate_dim = intermediate_dim

    def build(self, input_shape) -> None:
        """Make the three projections."""
        self.gate_proj = Linear(self.intermediate_dim, dtype=self.dtype_policy, name="gate_proj")
        self.up_proj = Linear(self.intermediate_dim, dtype=self.dtype_policy, name="up_proj")
        self.down_proj = Linear(input_shape[-1], dtype=self.dtype_policy, name="down_proj")
        self.gate_proj.build(input_shape)
        self.up_proj.build(input_shape)
        self.down_proj.build((*input_shape[:-1], self.intermediate_dim))

    def call(self, x):
        """(…, D) -> (…, D)."""
        return self.down_proj(gated_gelu(self.gate_proj(x), self.up_proj(x)))

    def compute_output_shape(self, input_shape):
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict:
        """Constructor arguments."""
        return {**super().get_config(), "intermediate_dim": self.intermediate_dim}
