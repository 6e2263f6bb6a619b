"""How the next token is chosen from logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from gemma2_keras.errors import InputError

# Below every logit, and finite: sums and differences with it stay numbers.
EXCLUDED = -1e30
# Logits so far below the greatest have no probability; a lower one tells nothing more.
_LOWEST = -1e4
# What is larger, or nearer to zero, float32 cannot compute with.
_GREATEST_NUMBER, _LEAST_NUMBER = 1e30, 1e-30
# The smallest number that no backend takes for zero.
_TINY = 1.2e-38
# Halvings of the interval between the least and the greatest value: below the distance of neighbouring float32.
_HALVINGS = 40
_NOISE_BITS = 23

Processor = Callable[[list[list[int]], np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """A way to choose tokens; what is left at its default has no effect.

    Penalties, bias and forbidden tokens change the logits first; then come temperature, `top_k`, `top_p`, `min_p` and
    `typical_p`, in this order, each among what the one before has kept. That is the order of transformers.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token, which is greedy decoding.
        top_k: only the `top_k` likeliest tokens, and those as likely as the last of them.
        top_p: only the likeliest tokens that together have this probability.
        min_p: only tokens at least this fraction as likely as the likeliest.
        typical_p: only the tokens whose surprise is nearest to the expected one, that together have this probability.
        repetition_penalty: logits of tokens in the prompt or made before are divided by it (multiplied, if negative).
        presence_penalty: taken off the logits of tokens made before.
        frequency_penalty: taken off for each time a token was made before.
        logit_bias: token ids to what is added to their logits.
        forbidden_tokens: ids that are never chosen.
        logits_processors: functions of each row's token ids so far, a list of B lists, and (B, V) float32 logits as a
            NumPy array, that return new logits. They run first, in their order, once for each token.
        sampler: a `keras_hub.samplers.Sampler` of one's own, whose `get_next_token` chooses among what is left, after
            its own temperature.

    Raises:
        InputError: if a number is outside what is allowed.

    Sources: nucleus sampling (https://arxiv.org/abs/1904.09751), locally typical sampling
    (https://arxiv.org/abs/2202.00666), min-p (https://arxiv.org/abs/2407.01082), repetition penalty
    (https://arxiv.org/abs/1909.05858).

    >>> Sampling(temperature=0.7, top_p=0.9).is_greedy
    False
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    forbidden_tokens: Sequence[int] = ()
    logits_processors: Sequence[Processor] = ()
    sampler: Any = None

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, lambda x: x >= 0, "a number of at least 0")
        for name in ("top_p", "min_p", "typical_p"):
            value = getattr(self, name)
            if value is not None:
                _require(name, value, lambda x: 0 < x <= 1, "above 0 and at most 1, or None")
        if self.top_k is not None and not (_is_whole(self.top_k) and self.top_k >= 1):
            raise InputError(f"`top_k` must be a whole number of at least 1, or None; given {self.top_k!r}.")
        _require(
            "repetition_penalty",
            self.repetition_penalty,
            lambda x: x >= _LEAST_NUMBER,
            f"a number above 0, {_LEAST_NUMBER:g} at least",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _require(name, getattr(self, name), lambda x: True, "a finite number")
        if not isinstance(self.logit_bias, Mapping):
            raise InputError(f"`logit_bias` must map token ids to numbers; given {type(self.logit_bias).__name__}.")
        for token, bias in self.logit_bias.items():
            _require(f"logit_bias[{token!r}]", bias, lambda x: True, "a finite number")
        _require_all("forbidden_tokens", self.forbidden_tokens, _is_whole, "a list of token ids")
        _require_all("logits_processors", self.logits_processors, callable, "a list of functions")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, whatever the noise."""
        return self.temperature == 0 and self.sampler is None

    @property
    def uses(self) -> tuple[str, ...]:
        """Names of what has an effect: programs are compiled for these, whatever their values."""
        names = []
        if self.repetition_penalty != 1:
            names.append("repetition_penalty")
        names += [name for name in ("presence_penalty", "frequency_penalty") if getattr(self, name)]
        if self.logit_bias or len(self.forbidden_tokens):
            names.append("bias")
        if not self.is_greedy:
            names.append("noise")
            # The whole probability keeps every token; `min_p` of 1 keeps the likeliest alone.
            filters = {"top_k": None, "top_p": 1, "min_p": None, "typical_p": 1}
            names += [name for name, idle in filters.items() if getattr(self, name) not in (None, idle)]
        return tuple(names)

    @property
    def remembers(self) -> bool:
        """Whether the choice depends on the tokens before."""
        return any(name.endswith("penalty") for name in self.uses)

    def values(self, vocabulary_size: int) -> dict[str, np.ndarray]:
        """The numbers of `uses` as arrays, which `adjusted` and `choose` take.

        Raises:
            InputError: if a biased or forbidden token is outside the vocabulary, or every token is forbidden.
        """
        values = {
            name: np.asarray(getattr(self, name), "float32")
            for name in self.uses
            if name not in ("bias", "noise", "top_k")
        }
        if "top_k" in self.uses:
            # No more than there are: a count beyond is no float32.
            values["top_k"] = np.asarray(min(int(self.top_k or 1), vocabulary_size), "float32")
        values["temperature"] = np.asarray(max(self.temperature, _LEAST_NUMBER) if self.temperature else 1.0, "float32")
        if "bias" in self.uses:
            bias = np.zeros(vocabulary_size, "float32")
            for name, tokens in (("logit_bias", self.logit_bias), ("forbidden_tokens", self.forbidden_tokens)):
                for token in tokens:
                    if not _is_whole(token) or not 0 <= token < vocabulary_size:
                        raise InputError(f"`{name}` takes ids from 0 to {vocabulary_size - 1}; given {token!r}.")
            for token, value in self.logit_bias.items():
                bias[token] = value
            bias[list(self.forbidden_tokens)] = EXCLUDED
            if (bias == EXCLUDED).all():
                raise InputError("`forbidden_tokens` forbids every token of the vocabulary.")
            values["bias"] = bias
        return values


def sampling_of(sampler: Any, overrides: Mapping[str, Any]) -> Sampling:
    """What `compile(sampler=…)` chose, with what a call overrides.

    A greedy sampler becomes random sampling when a call asks for a temperature above 0 or for a filter.

    Args:
        sampler: a `keras_hub.samplers.Sampler`.
        overrides: arguments of `Sampling`.
    """
    known = keras_hub.samplers
    chosen: dict[str, Any] = {"temperature": 1.0}
    match sampler:
        case known.GreedySampler() if type(sampler) is known.GreedySampler:
            filters = ("temperature", "top_k", "top_p", "min_p", "typical_p")
            chosen["temperature"] = 1.0 if any(overrides.get(name) is not None for name in filters) else 0.0
        case known.RandomSampler() if type(sampler) is known.RandomSampler:
            chosen["temperature"] = sampler.temperature
        case known.TopKSampler() if type(sampler) is known.TopKSampler:
            chosen |= {"temperature": sampler.temperature, "top_k": sampler.k}
        case known.TopPSampler() if type(sampler) is known.TopPSampler:
            chosen |= {"temperature": sampler.temperature, "top_p": sampler.p, "top_k": sampler.k}
        case _:
            # It divides by its own temperature itself.
            chosen["sampler"] = sampler
    return Sampling(**{**chosen, **{name: value for name, value in overrides.items() if value is not None}})


def noise(seed: int, copy: int, row: Sequence[int], steps: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for the tokens that follow a prompt, the same on every backend and in any batch.

    Args:
        seed: of the call.
        copy: how many equal prompts stand before this one in the call.
        row: the prompt's token ids.
        steps: how many numbers.

    Returns:
        (steps,) float32.
    """
    entropy = [seed % 2**64, copy, *(int(token) for token in row)]
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    # So few bits that a product with a sum of probabilities stays below it.
    return (generator.integers(0, 2**_NOISE_BITS, steps) / 2**_NOISE_BITS).astype("float32")


def adjusted(logits: Any, values: dict[str, Any], prompt_counts: Any, made_counts: Any, uses: tuple[str, ...]) -> Any:
    """Logits after penalties and bias.

    Args:
        logits: (B, V) float32.
        values: of `Sampling.values`.
        prompt_counts: (B, V) int32, how often each token stands in the prompt; read for penalties alone.
        made_counts: (B, V) int32, how often it was made.
        uses: of `Sampling.uses`.
    """
    if "repetition_penalty" in uses:
        penalty = values["repetition_penalty"]
        seen = ops.logical_or(prompt_counts > 0, made_counts > 0)
        logits = ops.where(seen, ops.where(logits > 0, logits / penalty, logits * penalty), logits)
    if "presence_penalty" in uses:
        logits = logits - values["presence_penalty"] * ops.cast(made_counts > 0, "float32")
    if "frequency_penalty" in uses:
        logits = logits - values["frequency_penalty"] * ops.cast(made_counts, "float32")
    if "bias" in uses:
        logits = ops.maximum(logits + values["bias"][None], EXCLUDED)
    return logits


def choose(logits: Any, values: dict[str, Any], noise: Any, uses: tuple[str, ...]) -> Any:
    """A token of each row.

    Args:
        logits: (B, V) float32, adjusted.
        values: of `Sampling.values`.
        noise: (B,) float32 in [0, 1).
        uses: of `Sampling.uses`.

    Returns:
        (B,) int32.
    """
    if "noise" not in uses:
        return ops.cast(ops.argmax(logits, axis=-1), "int32")
    return _drawn(kept(logits, values, uses), noise)


def kept(logits: Any, values: dict[str, Any], uses: tuple[str, ...]) -> Any:
    """(B, V) logits, less the greatest, over the temperature, with `EXCLUDED` for tokens that a filter leaves out."""
    below = (logits - ops.max(logits, axis=-1, keepdims=True)) / values["temperature"]
    logits = ops.where(logits > EXCLUDED, ops.maximum(below, _LOWEST), EXCLUDED)

    def keep(condition):
        return ops.where(condition, logits, EXCLUDED)

    if "top_k" in uses:
        logits = keep(logits >= _threshold(logits, ops.ones_like(logits), values["top_k"]))
    if "top_p" in uses:
        logits = keep(logits >= _threshold(logits, ops.softmax(logits, axis=-1), values["top_p"]))
    if "min_p" in uses:
        logits = keep(logits >= ops.max(logits, axis=-1, keepdims=True) + ops.log(values["min_p"]))
    if "typical_p" in uses:
        probabilities = ops.softmax(logits, axis=-1)
        surprise = -ops.log(ops.maximum(probabilities, _TINY))
        expected = ops.sum(probabilities * surprise, axis=-1, keepdims=True)
        nearness = ops.where(probabilities > 0, -ops.abs(surprise - expected), EXCLUDED)
        logits = keep(nearness >= _threshold(nearness, probabilities, values["typical_p"]))
    return logits


def _threshold(values: Any, weights: Any, least: Any) -> Any:
    """The greatest number such that the values not below it weigh at least `least` together, by halving.

    A sort of the whole vocabulary would take longer than the model on a small machine.

    Args:
        values: (B, V) float32; those that are `EXCLUDED` are never needed.
        weights: (B, V) float32.
        least: scalar.

    Returns:
        (B, 1) float32.
    """
    real = values > EXCLUDED
    weights = ops.where(real, weights, 0.0)
    high = ops.max(values, axis=-1, keepdims=True)
    low = ops.min(ops.where(real, values, high), axis=-1, keepdims=True)
    # All there is, where that is less than asked for.
    least = ops.minimum(least, ops.sum(weights, axis=-1, keepdims=True) * (1 - 1e-6))

    def enough(at):
        return ops.sum(ops.where(values >= at, weights, 0.0), axis=-1, keepdims=True) >= least

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) / 2
        holds = enough(middle)
        return ops.where(holds, middle, low), ops.where(holds, high, middle)

    found = ops.fori_loop(0, _HALVINGS, halve, (low, high))[0]
    return ops.where(enough(high), high, found)


def _drawn(logits: Any, noise: Any) -> Any:
    """(B,) tokens, each where the running sum of probabilities passes the noise."""
    vocabulary_size = logits.shape[-1]
    block = math.isqrt(vocabulary_size) + 1
    weights = ops.exp(logits - ops.max(logits, axis=-1, keepdims=True))
    weights = ops.pad(weights, ((0, 0), (0, -vocabulary_size % block)))
    # First the block of tokens, then the token in it: running sums over the whole vocabulary are slow, and round more.
    blocks = ops.reshape(weights, (-1, weights.shape[-1] // block, block))
    first, rest = _passed(ops.sum(blocks, axis=-1), noise)
    within = ops.take_along_axis(blocks, first[:, None, None], axis=1)[:, 0]
    second, _ = _passed(within, rest)
    return first * block + second


def _passed(weights: Any, share: Any) -> tuple[Any, Any]:
    """Index of the weight where the running sum passes `share` of the whole, and the share of that weight passed."""
    running = ops.cumsum(weights, axis=-1)
    target = running[:, -1:] * share[:, None]
    index = ops.cast(ops.sum(ops.cast(running <= target, "int32"), axis=-1), "int32")
    index = ops.minimum(index, weights.shape[-1] - 1)
    weight = ops.take_along_axis(weights, index[:, None], axis=-1)[:, 0]
    before = ops.take_along_axis(running, index[:, None], axis=-1)[:, 0] - weight
    rest = (target[:, 0] - before) / ops.maximum(weight, _TINY)
    return index, ops.clip(rest, 0.0, 1.0 - 2.0**-_NOISE_BITS)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _require(name: str, value: Any, holds: Callable[[Any], bool], allowed: str) -> None:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    # Also false of what is no number at all, as NaN.
    if not number or not abs(value) <= _GREATEST_NUMBER or not holds(value):
        raise InputError(f"`{name}` must be {allowed}, and at most {_GREATEST_NUMBER:g} in size; given {value!r}.")


def _require_all(name: str, values: Any, holds: Callable[[Any], bool], allowed: str) -> None:
    several = isinstance(values, Sequence | Set | np.ndarray) and not isinstance(values, str)
    if not several or not all(map(holds, values)):
        raise InputError(f"`{name}` must be {allowed}; given {values!r}.")


GREEDY = Sampling(temperature=0.0)
