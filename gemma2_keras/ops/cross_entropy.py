"""The loss of the next token."""

from typing import Any, NamedTuple

from keras import ops

from gemma2_keras.ops.attention import soft_cap
from gemma2_keras.ops.linear import linear


class TokenSums(NamedTuple):
    """Weighted sums over tokens, float32 scalars.

    Attributes:
        loss: what is minimised, in nats.
        surprise: the negative log-probability of the labels, in nats.
        correct: 1 for each label that the model ranks first.
    """

    loss: Any
    surprise: Any
    correct: Any


class LossTerms(NamedTuple):
    """What is added to the negative log-probability.

    Attributes:
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        z_loss: factor on the square of the logits' log-sum-exp, which keeps it near zero.

    Source: label smoothing (https://arxiv.org/abs/1512.00567), z-loss (https://arxiv.org/abs/2204.02311).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


# Numbers in a block of logits, 256 MB of float32: some such blocks are in memory at a time, however long the batch.
_BLOCK = 2**26


def tokens_at_once(vocabulary_size):
    """How many tokens' logits are made at a time by kernels, a multiple of 8.

    >>> tokens_at_once(256_000)
    256
    """
    return max(8, _BLOCK // vocabulary_size // 8 * 8)


def token_losses(logits, labels, terms):
    """Loss and surprise of each token.

    Args:
        logits: (…, V) float32 tensor.
        labels: (…) int tensor of ids in [0, V).
        terms: `LossTerms`.

    Returns:
        Two (…) float32 tensors, in nats.
    """
    normaliser = ops.logsumexp(logits, axis=-1)
    chosen = ops.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    target = chosen
    if terms.label_smoothing:
        target = (1.0 - terms.label_smoothing) * chosen + terms.label_smoothing * ops.mean(logits, axis=-1)
    return normaliser - target + terms.z_loss * ops.square(normaliser), normaliser - chosen


def projected_cross_entropy(hidden, table, labels, weights, cap, terms, training, table_trains):
    """The loss of tokens whose logits are `soft_cap(hidden table^T, cap)`.

    Args:
        hidden: (M, D) float tensor, states of M tokens after the last norm.
        table: (V, D) tensor of the same dtype.
        labels: (M,) int tensor of ids in [0, V).
        weights: (M,) float32 tensor; 0 leaves a token out.
        cap: soft cap on the logits; `None` for none.
        terms: `LossTerms`.
        training: whether `loss` will be differentiated. A kernel then makes its gradient along with it.
        table_trains: whether with respect to the table, too.

    Returns:
        `TokenSums`, of which `loss` alone has a gradient.
    """
    del training, table_trains
    logits = soft_cap(ops.cast(linear(hidden, table), "float32"), cap)
    loss, surprise = token_losses(logits, labels, terms)
    correct = ops.cast(ops.equal(ops.argmax(logits, axis=-1), ops.cast(labels, "int32")), "float32")
    return TokenSums(
        ops.sum(loss * weights),
        ops.stop_gradient(ops.sum(surprise * weights)),
        ops.stop_gradient(ops.sum(correct * weights)),
    )


def expected_cross_entropy(hidden, table, labels, weights, cap, terms, normaliser, first, expected):
    """The loss of tokens, and its gradient, from what a kernel says of the softmax of each.

    Args:
        hidden: as `projected_cross_entropy`, and so the next ones.
        table: likewise.
        labels: likewise.
        weights: likewise.
        cap: likewise.
        terms: likewise, without label smoothing.
        normaliser: (M,) float32 tensor, the log of the sum of the exponentials of the logits.
        first: (M,) int32 tensor, the likeliest words.
        expected: (M, D) float32 tensor, the gradient of `normaliser` with respect to `hidden`; `None` for no gradient.

    Returns:
        `TokenSums`, and the (M, D) float32 gradient of its loss, or `None`.
    """
    rows = ops.cast(ops.take(table, labels, axis=0), "float32")
    chosen = soft_cap(ops.sum(ops.cast(hidden, "float32") * rows, axis=-1), cap)
    loss = normaliser - chosen + terms.z_loss * ops.square(normaliser)
    correct = ops.cast(ops.equal(first, ops.cast(labels, "int32")), "float32")
    sums = TokenSums(*(ops.sum(x * weights) for x in (loss, normaliser - chosen, correct)))
    if expected is None:
        return sums, None
    slope = ops.ones_like(chosen) if cap is None else 1.0 - ops.square(chosen / cap)
    factor = 1.0 + 2.0 * terms.z_loss * normaliser
    return sums, weights[:, None] * (factor[:, None] * expected - slope[:, None] * rows)
