"""One decoder block: two residual branches, each normalised before and after."""

from __future__ import annotations

import keras

from gemma2_keras.layers.attention import Attention
from gemma2_keras.layers.feed_forward import FeedForward
from gemma2_keras.layers.lean import LeanLayer
from gemma2_keras.layers.norm import RMSNorm


@keras.saving.register_keras_serializable(package="gemma2_keras")
class DecoderBlock(LeanLayer):
    """Attention and feed-forward, each `x + norm(branch(norm(x)))`.

    Args:
        num_query_heads: query heads N.
        num_key_value_heads: key and value heads K.
        head_dim: size H of a head.
        intermediate_dim: feed-forward width F.
        attention_scale: factor on the attention scores.
        attention_logit_soft_cap: soft cap on the scores; `None` for none.
        local: whether attention sees only the sliding window.
        layer_norm_epsilon: of the four norms.
        dropout: rate on the output of each branch, in training.
        **kwargs: as `keras.layers.Layer` takes them.

    Attributes:
        remat: whether training keeps each branch's input alone, and computes the rest again for the gradient.

    Source: Gemma 2 (https://arxiv.org/abs/2408.00118), section 2.
    """

    def __init__(
        self,
        num_query_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        intermediate_dim: int,
        attention_scale: float,
        attention_logit_soft_cap: float | None,
        local: bool,
        layer_norm_epsilon: float = 1e-6,
        dropout: float = 0.0,
        **kwargs,
    ) -> None:
        # The context's float32 tables must pass uncast.
        super().__init__(autocast=False, **kwargs)
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_dim = intermediate_dim
        self.attention_scale = attention_scale
        self.attention_logit_soft_cap = attention_logit_soft_cap
        self.local = local
        self.layer_norm_epsilon = layer_norm_epsilon
        self.dropout = dropout
        self.remat = False

    def build(self, input_shape, **_) -> None:
        """Make the branches and their norms."""
        policy, epsilon = self.dtype_policy, self.layer_norm_epsilon
        self.input_layernorm = RMSNorm(epsilon, dtype=policy, name="input_layernorm")
        self.attention = Attention(
            self.num_query_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.attention_scale,
            self.attention_logit_soft_cap,
            self.local,
            dtype=policy,
            name="attention",
        )
        self.post_attention_layernorm = RMSNorm(epsilon, dtype=policy, name="post_attention_layernorm")
        self.pre_feedforward_layernorm = RMSNorm(epsilon, dtype=policy, name="pre_feedforward_layernorm")
        self.feed_forward = FeedForward(self.intermediate_dim, dtype=policy, name="feed_forward")
        self.post_feedforward_layernorm = RMSNorm(epsilon, dtype=policy, name="post_feedforward_layernorm")
        self.branch_dropout = keras.layers.Dropout(self.dropout, dtype=policy) if self.dropout else None
        for layer in (
            self.input_layernorm,
            self.attention,
            self.post_attention_layernorm,
            self.pre_feedforward_layernorm,
            self.feed_forward,
            self.post_feedforward_layernorm,
        ):
            layer.build(input_shape)

    def call(self, x, context, cache=None, training=None):
        """One block's step.

        Args:
            x: (B, T, D) tensor, in the compute dtype.
            context: `StepContext` of this step.
            cache: as `Attention` takes it.
            training: whether dropout is active.

        Returns:
            (B, T, D) tensor.
        """

        def attend(x):
            branch = self.attention(self.input_layernorm(x), context=context, cache=cache)
            return self.post_attention_layernorm(branch)

        def transform(x):
            return self.post_feedforward_layernorm(self.feed_forward(self.pre_feedforward_layernorm(x)))

        # Dropout stays outside: it would draw anew when a branch is computed again.
        for branch in (attend, transform):
            made = keras.remat(branch)(x) if self.remat and training else branch(x)
            x = x + self._drop(made, training)
        return x

    def _drop(self, x, training):
        return x if self.branch_dropout is None else self.branch_dropout(x, training=training)

    def compute_output_spec(self, x, context, cache=None, training=None):
        """The input's shape and dtype."""
        return keras.KerasTensor(x.shape, self.compute_dtype)

    def get_config(self) -> dict:
        """Constructor arguments."""
        names = (
            "num_query_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_dim",
            "attention_scale",
            "attention_logit_soft_cap",
            "local",
            "layer_norm_epsilon",
            "dropout",
        )
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
