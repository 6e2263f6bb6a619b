"""A model's programs, as its backend compiles them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops

from gemma2_keras.generation import engine, loop
from gemma2_keras.kernels import compiled
from gemma2_keras.ops.cross_entropy import LossTerms, token_losses

# Tokens that a model makes with the kernels before its weights are moved to where they are read faster: who makes only
# a few does not pay for it.
_SETTLE_AFTER = 64


class Engine:
    """A backbone's programs, compiled when they are first needed and kept.

    Args:
        backbone: a `Gemma2Backbone`. Its weights may change between calls; once adapters are added, make a new engine.

    Attributes:
        compilations: how many programs have been compiled, or traced, so far.
    """

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone
        self.compilations = 0
        self._made = 0

        self.chunk = self.program(lambda *arguments: _chunk(backbone, *arguments))
        self.write = self.program(engine.write_chunk, donate=0)
        self.burst = self.program(lambda *arguments, uses: loop.burst(backbone, *arguments, uses=uses), donate=0)
        self.step = self.program(lambda *arguments: loop.step(backbone, *arguments), donate=1)
        self.logits = self.program(lambda states: backbone.token_embedding(states, reverse=True))
        self.surprise = self.program(lambda states, labels: _surprise(backbone, states, labels))
        self.likeliest = self.program(lambda states, count: _likeliest(backbone, states, count))
        self.pick = self.program(
            lambda logits, *arguments, uses: loop.pick(_sized(backbone, logits), *arguments, uses=uses)
        )
        self.note = self.program(loop.note)

    def program(self, function: Callable, donate: int | None = None) -> Callable:
        """`function` of tensors and keyword arguments that are compiled in, as `kernels.compiled` makes it."""
        return compiled(function, self.backbone.variables, self._note, donate)

    def settles(self, tokens: int) -> bool:
        """Whether, with so many more tokens, it is time to move the weights; true once."""
        before, self._made = self._made, self._made + tokens
        return before < _SETTLE_AFTER <= self._made

    def _note(self) -> None:
        self.compilations += 1


def _chunk(backbone: Any, token_ids: Any, positions: Any, numbers: Any, last: Any, past: Any = None) -> Any:
    """`engine.chunk`, with the states at the places `last` instead of all."""
    hidden, chunks = engine.chunk(backbone, token_ids, positions, numbers, past)
    return ops.take(hidden[0], last, axis=0), chunks


def _surprise(backbone: Any, states: Any, labels: Any) -> Any:
    """(M, D) states and (M,) next tokens to their (M,) negative log-probabilities."""
    return token_losses(_logits(backbone, states), labels, LossTerms())[1]


def _likeliest(backbone: Any, states: Any, count: int) -> Any:
    """(M, D) states to the (M, count) ids of the likeliest next tokens, and their float32 probabilities."""
    logits = _logits(backbone, states)
    chosen, ids = ops.top_k(logits, count)
    return ops.cast(ids, "int32"), ops.exp(chosen - ops.logsumexp(logits, axis=-1, keepdims=True))


def _logits(backbone: Any, states: Any) -> Any:
    return _sized(backbone, backbone.token_embedding(states, reverse=True))


def _sized(backbone: Any, logits: Any) -> Any:
    """A graph whose sizes are free knows the vocabulary all the same."""
    return ops.reshape(logits, (-1, backbone.config.vocabulary_size))
