"""Low-rank adapters of a linear layer: what one is like, its weights, and what it adds to the layer's output."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from gemma2_keras.kernels import linear


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The hyperparameters of one layer's adapter, under the names that PEFT gives them.

    Attributes:
        rank: width R of the adapter, at least 1.
        alpha: numerator of the factor on the adapter's output; `None` is `rank`.
        dropout: rate on the adapter's input, in training.
        use_rslora: whether the factor is `alpha / sqrt(rank)` instead of `alpha / rank`.
        use_dora: whether each row of the adapted weight is brought to a trainable length.

    Raises:
        ValueError: if `rank` or `alpha` is not above 0, or `dropout` not at least 0 and below 1.

    Example:

    >>> LowRank(4, alpha=8).scale, LowRank(4, alpha=8, use_rslora=True).scale
    (2.0, 4.0)

    Source: LoRA (https://arxiv.org/abs/2106.09685), rsLoRA (https://arxiv.org/abs/2312.03732), DoRA
    (https://arxiv.org/abs/2402.09353).
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"`rank` must be a whole number of at least 1; given {self.rank!r}.")
        if self.alpha is not None and not (_is_number(self.alpha) and 0 < self.alpha < math.inf):
            raise ValueError(f"`alpha` must be a number above 0; given {self.alpha!r}.")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"`dropout` must be at least 0 and below 1; given {self.dropout!r}.")
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False; given {getattr(self, name)!r}.")

    @property
    def scale(self) -> float:
        """The factor on the adapter's output."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Adapter:
    """An adapter's weights, which belong to its layer, and what it computes.

    Args:
        spec: its hyperparameters.
        a: (R, in) float32 variable.
        b: (out, R) float32 variable.
        magnitude: (out,) float32 variable, the lengths of the rows; `None` without DoRA.
        seed: source of dropout's randomness; `None` without dropout.
    """

    def __init__(self, spec: LowRank, a: Any, b: Any, magnitude: Any = None, seed: Any = None) -> None:
        self.spec = spec
        self.seed = seed
        self.variables = {"lora_a": a, "lora_b": b}
        if magnitude is not None:
            self.variables["lora_magnitude"] = magnitude

    @property
    def a(self) -> Any:
        """(R, in) variable."""
        return self.variables["lora_a"]

    @property
    def b(self) -> Any:
        """(out, R) variable."""
        return self.variables["lora_b"]

    def adapted(self, x: Any, y: Any, weight: Any, training: bool | None) -> Any:
        """The layer's output with the adapter.

        Two thin products in float32: the (out, in) delta is never made.

        Args:
            x: (…, in) tensor.
            y: (…, out) tensor, `x W^T`.
            weight: (out, in), W.
            training: whether dropout is active.

        Returns:
            (…, out) tensor of the dtype of `y`.
        """
        drops = bool(training and self.spec.dropout)
        kept = keras.random.dropout(x, self.spec.dropout, seed=self.seed) if drops else x
        thin = ops.matmul(ops.cast(kept, "float32"), ops.transpose(self.a))
        delta = ops.matmul(thin, ops.transpose(self.b)) * self.spec.scale
        if self.spec.use_dora:
            factor = self.row_factors(weight)
            # As PEFT: what is dropped is dropped from the base's part of the change too.
            base = linear(kept, weight) if drops else y
            delta = factor * delta + (factor - 1) * ops.cast(base, "float32")
        return y + ops.cast(delta, y.dtype)

    def row_factors(self, weight: Any) -> Any:
        """(out,) float32 factors that bring the rows of W + scale * B A to their magnitudes (DoRA)."""
        return ops.convert_to_tensor(self.variables["lora_magnitude"]) / self.row_lengths(weight)

    def row_lengths(self, weight: Any) -> Any:
        """(out,) float32 lengths of the rows of W + scale * B A, without making that sum.

        No gradient flows through them, as section 4.3 of the paper has it.
        """
        # Stopped before anything is computed: so no intermediate result is kept for a gradient.
        w, a, b = (ops.cast(ops.stop_gradient(ops.convert_to_tensor(v)), "float32") for v in (weight, self.a, self.b))
        scale = self.spec.scale
        crossed = ops.matmul(w, ops.transpose(a)) * (2 * scale) + ops.matmul(b, ops.matmul(a, ops.transpose(a))) * (
            scale * scale
        )
        return ops.sqrt(ops.sum(ops.square(w), axis=1) + ops.sum(crossed * b, axis=1))

    def merged(self, weight: np.ndarray) -> np.ndarray:
        """The (out, in) weight with the adapter in it, in the weight's dtype."""
        return merged(weight, self.spec, {name: ops.convert_to_numpy(value) for name, value in self.variables.items()})

    def reset(self, weight: Any) -> None:
        """Return to no effect on `weight`, the (out, in) weight."""
        self.b.assign(ops.zeros(self.b.shape))
        if self.spec.use_dora:
            self.variables["lora_magnitude"].assign(self.row_lengths(weight))


def merged(weight: np.ndarray, spec: LowRank, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """A weight with an adapter in it.

    Args:
        weight: (out, in) array.
        spec: the adapter's hyperparameters.
        arrays: its float32 weights, under the names of `Adapter.variables`.

    Returns:
        (out, in) array of the weight's dtype.
    """
    whole = weight.astype("float32") + arrays["lora_b"] @ arrays["lora_a"] * spec.scale
    if spec.use_dora:
        whole *= (arrays["lora_magnitude"] / np.linalg.norm(whole, axis=1))[:, None]
    return whole.astype(weight.dtype)
