"""The attention branch of a decoder block."""

from __future__ import annotations

import keras
from keras import ops

from gemma2_keras.kernels import apply_rotary, attention
from gemma2_keras.layers.lean import LeanLayer
from gemma2_keras.layers.linear import Linear


@keras.saving.register_keras_serializable(package="gemma2_keras")
class Attention(LeanLayer):
    """Grouped-query attention with rotary positions and soft-capped scores.

    Args:
        num_query_heads: query heads N.
        num_key_value_heads: key and value heads K, a divisor of N.
        head_dim: size H of a head.
        scale: factor on the scores.
        logit_soft_cap: soft cap on the scores; `None` for none.
        local: whether the layer sees only its window: which of the context's masks it reads.
        **kwargs: as `keras.layers.Layer` takes them.
    """

    def __init__(
        self,
        num_query_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        scale: float,
        logit_soft_cap: float | None,
        local: bool,
        **kwargs,
    ) -> None:
        super().__init__(autocast=False, **kwargs)
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.scale = scale
        self.logit_soft_cap = logit_soft_cap
        self.local = local

    def build(self, input_shape) -> None:
        """Make the four projections."""
        width = input_shape[-1]
        self.q_proj = Linear(self.num_query_heads * self.head_dim, dtype=self.dtype_policy, name="q_proj")
        self.k_proj = Linear(self.num_key_value_heads * self.head_dim, dtype=self.dtype_policy, name="k_proj")
        self.v_proj = Linear(self.num_key_value_heads * self.head_dim, dtype=self.dtype_policy, name="v_proj")
        self.o_proj = Linear(width, dtype=self.dtype_policy, name="o_proj")
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            projection.build(input_shape)
        self.o_proj.build((*input_shape[:-1], self.num_query_heads * self.head_dim))

    def call(self, x, context, cache=None):
        """Attend within `x`, or over what `cache` holds.

        Args:
            x: (B, T, D) tensor.
            context: `StepContext` of this step.
            cache: `None`, or an object whose `update_and_fetch(keys, values)` takes the (B, T, K, H) keys and values of
                this step and returns the (B, S, K, H) ones to attend to.

        Returns:
            (B, T, D) tensor.
        """
        query = apply_rotary(self._heads(self.q_proj(x), self.num_query_heads), context.cosine, context.sine)
        key = apply_rotary(self._heads(self.k_proj(x), self.num_key_value_heads), context.cosine, context.sine)
        value = self._heads(self.v_proj(x), self.num_key_value_heads)
        if cache is not None:
            key, value = cache.update_and_fetch(key, value)
        mixed = attention(query, key, value, context.mask(self.local), self.scale, self.logit_soft_cap)
        length = ops.shape(mixed)[1]
        return self.o_proj(ops.reshape(mixed, (-1, length, self.num_query_heads * self.head_dim)))

    def _heads(self, x, heads):
        return ops.reshape(x, (-1, ops.shape(x)[1], heads, self.head_dim))

    def compute_output_spec(self, x, context, cache=None):
        """The input's shape and dtype."""
        return keras.KerasTensor(x.shape, self.compute_dtype)

    def get_config(self) -> dict:
        """Constructor arguments."""
        names = ("num_query_heads", "num_key_value_heads", "head_dim", "scale", "logit_soft_cap", "local")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
