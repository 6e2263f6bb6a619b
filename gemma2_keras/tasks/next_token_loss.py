"""The loss of the next token, and what is watched along with it."""

from __future__ import annotations

import numbers
from typing import Any

import keras
from keras import ops

from gemma2_keras.ops.cross_entropy import LossTerms, TokenSums, token_losses


@keras.saving.register_keras_serializable(package="gemma2_keras")
class NextTokenLoss(keras.losses.Loss):
    """Cross-entropy of the next token, as the mean over the tokens that count, in nats.

    A model compiled with it, which is what `loss="auto"` is, never makes its (B, T, V) logits: `fit` and `evaluate`
    take some tokens at a time through the output projection, and make the gradient in the same pass.

    Args:
        label_smoothing: share of the target that is spread evenly over the vocabulary, from 0 to below 1.
        z_loss: factor on the square of the logits' log-sum-exp, at least 0; 1e-4 is usual.
        name: of the loss.
        **kwargs: `reduction` and `dtype`, as `keras.losses.Loss` takes them.

    Raises:
        ValueError: if a number is out of its range.

    Example:

    >>> import numpy as np
    >>> loss = NextTokenLoss(label_smoothing=0.1)
    >>> round(float(loss(np.array([[0, 1]]), np.array([[[2.0, 0.0], [0.0, 2.0]]], "float32"))), 4)
    0.2269

    Source: label smoothing (https://arxiv.org/abs/1512.00567), z-loss (https://arxiv.org/abs/2204.02311).
    """

    def __init__(
        self,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        name: str = "next_token_loss",
        reduction: str = "mean_with_sample_weight",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, reduction=reduction, **kwargs)
        for argument, value, end in (("label_smoothing", label_smoothing, 1.0), ("z_loss", z_loss, float("inf"))):
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value < end:
                raise ValueError(f"`{argument}` must be a number of at least 0 and below {end:g}; given {value!r}.")
        self.terms = LossTerms(float(label_smoothing), float(z_loss))

    def call(self, y_true, y_pred):
        """(B, T) labels and (B, T, V) logits to (B, T) losses."""
        return token_losses(ops.cast(y_pred, "float32"), ops.cast(y_true, "int32"), self.terms)[0]

    def get_config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {**super().get_config(), "label_smoothing": self.terms.label_smoothing, "z_loss": self.terms.z_loss}


class Perplexity(keras.metrics.Metric):
    """`exp` of the mean surprise, in nats, of the tokens that count.

    Args:
        name: of the metric.

    Example:

    >>> metric = Perplexity()
    >>> metric.update_state(2.0, 4.0)
    >>> round(float(metric.result()), 4)
    1.6487
    """

    def __init__(self, name: str = "perplexity") -> None:
        super().__init__(name=name)
        self.surprise = self.add_variable((), initializer="zeros", name="surprise")
        self.tokens = self.add_variable((), initializer="zeros", name="tokens")

    def update_state(self, surprise, tokens) -> None:
        """Add the summed surprise of so many tokens."""
        self.surprise.assign_add(ops.cast(surprise, self.dtype))
        self.tokens.assign_add(ops.cast(tokens, self.dtype))

    def result(self):
        """The perplexity so far; 1 before any token."""
        return ops.exp(ops.divide_no_nan(self.surprise, self.tokens))


class TokenMetrics:
    """Accuracy and perplexity, from the sums that the loss makes anyway.

    Attributes:
        all: the Keras metrics.
    """

    def __init__(self) -> None:
        self._accuracy = keras.metrics.Mean(name="sparse_categorical_accuracy")
        self._perplexity = Perplexity()
        self.all = [self._accuracy, self._perplexity]

    def update(self, sums: TokenSums, tokens: Any) -> None:
        """Add the sums of so many tokens."""
        self._accuracy.update_state(ops.divide_no_nan(sums.correct, tokens), sample_weight=tokens)
        self._perplexity.update_state(sums.surprise, tokens)
