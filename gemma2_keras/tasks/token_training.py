"""Training on tokens without their logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from gemma2_keras.errors import InputError, warn
from gemma2_keras.tasks.distillation_loss import DistillationLoss, split_targets
from gemma2_keras.tasks.next_token_loss import NextTokenLoss, TokenMetrics
from gemma2_keras.tasks.text_generation import TextGeneration

# In the order in which Keras' trainer hands them over.
_JAX_STATE = ("trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables")


class TokenTraining(TextGeneration):
    """A model that generates, whose training and evaluation stop at the hidden states when the loss needs no more.

    Keras' trainers take a model's output to `compute_loss`: within a step that output is the (B, T, D) states, which
    `NextTokenLoss` is computed from; everywhere else, and with any other loss or metric, it is the logits.
    """

    _token_metrics: TokenMetrics | None = None
    _takes_states = False
    _in_step = False

    def compile_training(self, loss: Any, weighted_metrics: Any, others: dict[str, Any]) -> tuple[Any, Any]:
        """Decide how losses are made.

        Args:
            loss: as `compile` is given it.
            weighted_metrics: likewise.
            others: what else it is given.

        Returns:
            `loss` and `weighted_metrics` for `keras_hub.models.CausalLM.compile`.

        Raises:
            ValueError: if the loss is no single number, or a `DistillationLoss` is to be weighted once more.
        """
        loss = NextTokenLoss() if isinstance(loss, str) and loss == "auto" else loss
        if isinstance(loss, NextTokenLoss) and loss.reduction in (None, "none"):
            raise ValueError(
                f"`loss` has the reduction {loss.reduction!r}, a number for each token; training needs one for all: "
                'leave `reduction` out, or give "sum" or "mean". The losses of single tokens are '
                '`score(..., scoring_mode="loss")`.'
            )
        if isinstance(loss, DistillationLoss) and others.get("loss_weights"):
            raise ValueError("`loss_weights` has no place beside `DistillationLoss`, whose `weight` is its own.")
        automatic = isinstance(weighted_metrics, str) and weighted_metrics == "auto"
        plain = isinstance(loss, NextTokenLoss) and loss.reduction == "mean_with_sample_weight"
        needs_logits = others.get("metrics") or others.get("loss_weights") or not (automatic or not weighted_metrics)
        self._takes_states = plain and not needs_logits
        self._token_metrics = TokenMetrics() if self._takes_states and automatic else None
        # Keras keeps the metrics of an earlier call where none are given.
        self._compile_metrics = None
        return loss, None if self._takes_states else weighted_metrics

    def set_remat(self, remat: bool) -> None:
        """Keep, in training, the inputs of every decoder block's branches alone, or all that the gradient needs."""
        if not isinstance(remat, bool):
            raise ValueError(f"`remat` must be True or False; given {remat!r}.")
        for block in self.backbone.transformer_layers:
            block.remat = remat

    @property
    def remat(self) -> bool:
        """Whether training computes each branch again for its gradient, as `compile(remat=True)` asks."""
        return self.backbone.transformer_layers[0].remat

    def notice_coarse_weights(self) -> None:
        """Warn, in the name of who called the caller, if what would be trained is too coarse for its steps."""
        coarse = {variable.dtype for variable in self.trainable_variables} & {"bfloat16", "float16"}
        if coarse:
            warn(
                f"Weights of {' and '.join(sorted(coarse))} are to be trained: most steps are smaller than what these "
                "can tell apart, and are lost. Load the model with dtype='mixed_bfloat16', which keeps weights in "
                "float32 and multiplies in bfloat16, or train adapters: model.enable_lora(rank=8)."
            )

    @property
    def watches_tokens(self) -> bool:
        """Whether accuracy and perplexity come from the sums of the loss."""
        return self._token_metrics is not None

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """What `compile` asked for."""
        own = [] if self._token_metrics is None else self._token_metrics.all
        return [*super().metrics, *own]

    def call(self, inputs, training=None, mask=None):
        """Tokens to logits, or to states within a step whose loss needs no logits."""
        if self._in_step:
            return self.backbone(inputs, training=training)
        return super().call(inputs, training=training, mask=mask)

    def train_step(self, *args):
        """One step of training, as the backend's trainer makes it."""
        with self._step():
            return super().train_step(*args)

    def test_step(self, *args):
        """One step of evaluation, as the backend's trainer makes it."""
        with self._step():
            return super().test_step(*args)

    def _get_jax_state(self, purge_model_variables=False, **asked):
        """The values of variables that a step on JAX takes.

        Keras takes them out of the variables meanwhile, and puts back what the last step made: if the first one fails,
        nothing. Here it is then what was taken.
        """
        state = super()._get_jax_state(purge_model_variables=purge_model_variables, **asked)
        if purge_model_variables:
            self._jax_state = dict(zip([name for name in _JAX_STATE if asked.get(name)], state, strict=True))
        return state

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        self._in_step = self._takes_states
        try:
            yield
        finally:
            self._in_step = False

    def compute_loss(self, x=None, y=None, y_pred: Any = None, sample_weight=None, training=True):
        """The loss of states within such a step, otherwise that of logits."""
        labels, teacher = split_targets(y)
        if isinstance(self.loss, NextTokenLoss):
            _check_kind(self.loss, teacher)
        if self._takes_states or teacher is not None:
            labels, sample_weight = _checked(labels, sample_weight, tuple(y_pred.shape[:2]))
        if not self._in_step and teacher is not None:
            # Keras would look for an output of the model under the name of each target, now and before every `fit`.
            self._compile_loss.built = True
            return self.loss(y, y_pred, sample_weight) + sum(self.losses)
        if not self._in_step:
            return super().compute_loss(x, labels, y_pred, sample_weight, training)
        sums = self.backbone.token_embedding.cross_entropy(
            y_pred, labels, sample_weight, self.loss.terms, training, teacher
        )
        tokens = ops.sum(sample_weight)
        if self._token_metrics is not None:
            self._token_metrics.update(sums, tokens)
        return ops.divide_no_nan(sums.loss, tokens) + sum(self.losses)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """All metrics; those of a step without logits were updated with its loss."""
        if not self._in_step:
            return super().compute_metrics(x, split_targets(y)[0], y_pred, sample_weight)
        return self.get_metrics_result()


def _check_kind(loss: NextTokenLoss, teacher: Any) -> None:
    """Refuse a loss without the targets it is of."""
    if isinstance(loss, DistillationLoss) and teacher is None:
        raise InputError(
            "`DistillationLoss` needs a teacher's distributions beside the labels: train, and validate, on what "
            "`gemma2_keras.teach(teacher, data, student)` makes."
        )
    if teacher is not None and not isinstance(loss, DistillationLoss):
        raise InputError(
            "`y` has a teacher's distributions, which the loss would not read: compile the model with "
            "`loss=gemma2_keras.DistillationLoss()`."
        )


def _checked(y: Any, sample_weight: Any, shape: tuple) -> tuple[Any, Any]:
    """Labels and float32 weights of this shape; weights may be given for whole examples."""
    if y is None:
        raise InputError("`y` is missing: give labels beside token ids, the same ids one position on.")
    if not _fits(y, shape):
        raise InputError(f"`y` must have the shape of the token ids, {shape}; given {tuple(y.shape)}.")
    dtype = keras.backend.standardize_dtype(y.dtype)
    if "int" not in dtype:
        raise InputError(f"`y` must be whole numbers, the ids of the next tokens; given dtype {dtype}.")
    if sample_weight is None:
        return y, ops.ones_like(y, "float32")
    weights = ops.cast(sample_weight, "float32")
    if len(weights.shape) == 1:
        weights = weights[:, None]
    if not (_fits(weights, shape) or _fits(weights, (shape[0], 1))):
        raise InputError(
            f"`sample_weight` must have the shape of the token ids, {shape}, or one number for each example; given "
            f"{tuple(sample_weight.shape)}."
        )
    return y, ops.broadcast_to(weights, ops.shape(y))


def _fits(x: Any, shape: tuple) -> bool:
    """Whether sizes agree as far as they are known."""
    if len(x.shape) != len(shape):
        return False
    return all(None in sizes or sizes[0] == sizes[1] for sizes in zip(x.shape, shape, strict=True))
