"""The token embedding, which is also the output projection."""

from __future__ import annotations

import keras
from keras import ops

from gemma2_keras.kernels import linear, projected_cross_entropy
from gemma2_keras.layers.initialization import weight_initializer
from gemma2_keras.ops.attention import soft_cap
from gemma2_keras.ops.cross_entropy import Teacher


@keras.saving.register_keras_serializable(package="gemma2_keras")
class TokenEmbedding(keras.layers.Layer):
    """Token ids to scaled vectors and, with `reverse=True`, vectors to soft-capped logits, by one (V, D) table.

    Args:
        vocabulary_size: rows V of the table.
        hidden_dim: width D of a vector. Embeddings are multiplied by its square root, cast to the compute dtype first.
        final_logit_soft_cap: soft cap on the logits; `None` for none.
        **kwargs: as `keras.layers.Layer` takes them.

    Example:

    >>> import numpy as np
    >>> layer = TokenEmbedding(11, 4)
    >>> x = layer(np.array([[1, 2, 3]]))
    >>> tuple(x.shape), tuple(layer(x, reverse=True).shape)
    ((1, 3, 4), (1, 3, 11))
    """

    def __init__(
        self, vocabulary_size: int, hidden_dim: int, final_logit_soft_cap: float | None = None, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        self.vocabulary_size = vocabulary_size
        self.hidden_dim = hidden_dim
        self.final_logit_soft_cap = final_logit_soft_cap

    def build(self, input_shape) -> None:
        """Make the (V, D) table."""
        # Under a mixed policy rows are cast once they are looked up, not the whole table before.
        self.embeddings = self.add_weight(
            name="embeddings",
            shape=(self.vocabulary_size, self.hidden_dim),
            initializer=weight_initializer(),
            autocast=False,
        )

    def call(self, inputs, reverse: bool = False):
        """(B, T) ids -> (B, T, D) vectors; with `reverse`, (…, D) vectors -> (…, V) float32 logits."""
        if reverse:
            table = ops.cast(self.embeddings, self.compute_dtype)
            logits = linear(inputs, table)
            return soft_cap(ops.cast(logits, "float32"), self.final_logit_soft_cap)
        x = ops.cast(ops.take(self.embeddings, inputs, axis=0), self.compute_dtype)
        return x * ops.cast(self.hidden_dim**0.5, self.compute_dtype)

    def cross_entropy(self, states, labels, weights, terms, training, teacher=None):
        """The loss of labels, without making all logits at once.

        Args:
            states: (B, T, D) tensor, after the last norm.
            labels: (B, T) int tensor, ids in [0, V).
            weights: (B, T) float32 tensor; 0 leaves a token out.
            terms: `ops.cross_entropy.LossTerms`.
            training: whether the loss will be differentiated.
            teacher: `ops.cross_entropy.Teacher` of (B, T, K) tensors, if the terms give it a weight.

        Returns:
            `ops.cross_entropy.TokenSums`.
        """
        if teacher is not None:
            teacher = Teacher(*(ops.reshape(x, (-1, x.shape[-1])) for x in teacher))
        return projected_cross_entropy(
            ops.reshape(states, (-1, self.hidden_dim)),
            ops.cast(self.embeddings, self.compute_dtype),
            ops.reshape(ops.cast(labels, "int32"), (-1,)),
            ops.reshape(weights, (-1,)),
            self.final_logit_soft_cap,
            terms,
            training,
            self.embeddings.trainable,
            teacher,
        )

    def compute_output_spec(self, inputs, reverse: bool = False):
        """Shape and dtype of either direction."""
        if reverse:
            return keras.KerasTensor((*inputs.shape[:-1], self.vocabulary_size), "float32")
        return keras.KerasTensor((*inputs.shape, self.hidden_dim), self.compute_dtype)

    def get_config(self) -> dict:
        """Constructor arguments."""
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "hidden_dim": self.hidden_dim,
            "final_logit_soft_cap": self.final_logit_soft_cap,
        }
