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
    """What the loss is beside the negative log-probability of the label.

    Attributes:
        label_smoothing: share of the target that is spread evenly over the vocabulary.
        z_loss: factor on the square of the logits' log-sum-exp, which keeps it near zero.
        teacher_weight: share of the loss that is the cross-entropy with a teacher's distribution; 0 without a teacher.
        temperature: that the logits of both are divided by in this share, which is multiplied by its square.

    Source: label smoothing (https://arxiv.org/abs/1512.00567), z-loss (https://arxiv.org/abs/2204.02311), distillation
    and its temperature (https://arxiv.org/abs/1503.02531).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    teacher_weight: float = 0.0
    temperature: float = 1.0

    @property
    def uniform(self) -> float:
        """Share of the target that every word of the vocabulary has a part of."""
        return (1.0 - self.teacher_weight) * self.label_smoothing

    @property
    def softened(self) -> float:
        """Share of the loss that needs a softmax of its own, at another temperature."""
        return self.teacher_weight if self.temperature != 1.0 else 0.0


class Teacher(NamedTuple):
    """A teacher's distribution of the next token, over the words that it holds likely.

    Attributes:
        ids: (…, K) int tensor of ids in [0, V).
        shares: (…, K) float tensor of their probabilities at temperature 1, at least 0. What the other words have of
            the probability is shared out among these in proportion.
    """

    ids: Any
    shares: Any


# Numbers in a block of logits, 256 MB of float32: some such blocks are in memory at a time, however long the batch.
_BLOCK = 2**26


def tokens_at_once(vocabulary_size):
    """How many tokens' logits are made at a time by kernels, a multiple of 8.

    >>> tokens_at_once(256_000)
    256
    """
    return max(8, _BLOCK // vocabulary_size // 8 * 8)


def softened_shares(teacher, temperature):
    """(…, K) float32 shares of a teacher at a temperature, which sum to 1.

    A softmax over some of the logits, divided by the temperature, is in proportion to these powers of the shares.
    """
    shares = ops.cast(teacher.shares, "float32")
    if temperature != 1.0:
        shares = ops.power(shares, 1.0 / temperature)
    return ops.divide_no_nan(shares, ops.sum(shares, axis=-1, keepdims=True))


def sparse_targets(labels, teacher, terms):
    """The words that a loss names, and what its gradient with respect to their logits subtracts.

    Args:
        labels: (M,) int tensor.
        teacher: `Teacher` of (M, K) tensors, or `None`.
        terms: `LossTerms`.

    Returns:
        (M, 1 + K) ids, the label first, of the dtype of `labels`, and (M, 1 + K) float32 amounts. A word may be named
        twice.
    """
    ids = labels[:, None]
    hard = (1.0 - terms.teacher_weight) * (1.0 - terms.label_smoothing)
    amounts = ops.full_like(ids, hard, dtype="float32")
    if teacher is None:
        return ids, amounts
    soft = terms.teacher_weight * terms.temperature * softened_shares(teacher, terms.temperature)
    return ops.concatenate([ids, ops.cast(teacher.ids, ids.dtype)], 1), ops.concatenate([amounts, soft], 1)


def token_losses(logits, labels, terms, teacher=None):
    """Loss and surprise of each token.

    Args:
        logits: (…, V) float32 tensor.
        labels: (…) int tensor of ids in [0, V).
        terms: `LossTerms`.
        teacher: `Teacher` of (…, K) tensors, if the terms give it a weight.

    Returns:
        Two (…) float32 tensors, in nats.
    """
    normaliser = ops.logsumexp(logits, axis=-1)
    chosen = ops.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    target = chosen
    if terms.label_smoothing:
        target = (1.0 - terms.label_smoothing) * chosen + terms.label_smoothing * ops.mean(logits, axis=-1)
    loss = normaliser - target
    if teacher is not None:
        soft = terms.temperature**2 * _soft_surprise(logits / terms.temperature, teacher, terms.temperature)
        loss = (1.0 - terms.teacher_weight) * loss + terms.teacher_weight * soft
    return loss + terms.z_loss * ops.square(normaliser), normaliser - chosen


def _soft_surprise(logits, teacher, temperature):
    """The mean surprise of words that are drawn from the teacher's distribution."""
    chosen = ops.take_along_axis(logits, ops.cast(teacher.ids, "int32"), axis=-1)
    expected = ops.sum(softened_shares(teacher, temperature) * chosen, axis=-1)
    return ops.logsumexp(logits, axis=-1) - expected


def projected_cross_entropy(hidden, table, labels, weights, cap, terms, training, table_trains, teacher=None):
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
        teacher: `Teacher` of (M, K) tensors, if the terms give it a weight.

    Returns:
        `TokenSums`, of which `loss` alone has a gradient.
    """
    del training, table_trains
    logits = soft_cap(ops.cast(linear(hidden, table), "float32"), cap)
    loss, surprise = token_losses(logits, labels, terms, teacher)
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
        terms: likewise, without label smoothing or a teacher.
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
