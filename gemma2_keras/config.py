"""Hyperparameters of Gemma 2 and of PaliGemma 2's vision tower, checked when they are made. Imports no Keras."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any


@dataclasses.dataclass(frozen=True)
class Gemma2Config:
    """The numbers that fix a Gemma 2 text model.

    Args:
        vocabulary_size: rows of the embedding table.
        num_layers: decoder blocks; blocks 0, 2, 4, … see a window, the others the whole sequence.
        num_query_heads: query heads; a multiple of `num_key_value_heads`.
        num_key_value_heads: key and value heads, each shared by a group of query heads.
        hidden_dim: width of the residual stream.
        intermediate_dim: width of the gate and of the up projection, each.
        head_dim: size of one head; even, since rotary embedding turns its halves.
        query_pre_attention_scalar: attention scores are multiplied by its power of -1/2. `None`: `head_dim`.
        attention_logit_soft_cap: scores become `cap * tanh(score / cap)`; `None` leaves them as they are.
        final_logit_soft_cap: the same for the output logits.
        sliding_window_size: positions that a local layer sees, the current one included.
        layer_norm_epsilon: added to the mean square inside RMSNorm.
        rope_max_wavelength: base of the rotary wavelengths.
        dropout: rate, between 0 and 1, on the attention and the feed-forward branch in training.
        context_length: longest sequence, in tokens, that the model is made for.

    Raises:
        ValueError: if a number is outside what is allowed; the message names it.

    Example:

    >>> config = Gemma2Config(vocabulary_size=256000, num_layers=26, num_query_heads=8, num_key_value_heads=4,
    ...                       hidden_dim=2304, intermediate_dim=9216, head_dim=256)
    >>> config.parameter_count
    2614341888

    Source: Gemma 2 (https://arxiv.org/abs/2408.00118), table 1.
    """

    vocabulary_size: int
    num_layers: int
    num_query_heads: int
    num_key_value_heads: int
    hidden_dim: int
    intermediate_dim: int
    head_dim: int
    query_pre_attention_scalar: float | None = None
    attention_logit_soft_cap: float | None = 50.0
    final_logit_soft_cap: float | None = 30.0
    sliding_window_size: int = 4096
    layer_norm_epsilon: float = 1e-6
    rope_max_wavelength: float = 10_000.0
    dropout: float = 0.0
    context_length: int = 8192

    def __post_init__(self) -> None:
        if self.query_pre_attention_scalar is None:
            object.__setattr__(self, "query_pre_attention_scalar", self.head_dim)
        for name in _WHOLE:
            _require(self, name, _is_whole(getattr(self, name)), "a whole number of at least 1")
            most = _MOST_LAYERS if name == "num_layers" else _LARGEST
            _require(self, name, getattr(self, name) <= most, f"at most {most}")
        for name in _POSITIVE:
            _require(self, name, _is_number(getattr(self, name)) and getattr(self, name) > 0, "a number above 0")
        for name in ("attention_logit_soft_cap", "final_logit_soft_cap"):
            cap = getattr(self, name)
            _require(self, name, cap is None or (_is_number(cap) and cap > 0), "a number above 0, or None for no cap")
        _require(self, "dropout", _is_number(self.dropout) and 0 <= self.dropout < 1, "at least 0 and below 1")
        _require(self, "head_dim", self.head_dim % 2 == 0, "even, since rotary embedding turns its two halves")
        if self.num_query_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_query_heads` must be a multiple of `num_key_value_heads`, so that each key head serves as many "
                f"query heads; given {self.num_query_heads} and {self.num_key_value_heads}."
            )

    def is_local(self, layer: int) -> bool:
        """Whether decoder block `layer`, counted from 0, sees only its sliding window."""
        return layer % 2 == 0

    @property
    def attention_scale(self) -> float:
        """Factor on the attention scores."""
        scalar = self.query_pre_attention_scalar
        return float(self.head_dim if scalar is None else scalar) ** -0.5

    @property
    def parameter_count(self) -> int:
        """Number of weights, the tied embedding counted once."""
        query_width = self.num_query_heads * self.head_dim
        key_width = self.num_key_value_heads * self.head_dim
        attention = self.hidden_dim * (2 * query_width + 2 * key_width)
        feed_forward = 3 * self.hidden_dim * self.intermediate_dim
        norms = 4 * self.hidden_dim
        embedding = self.vocabulary_size * self.hidden_dim
        return embedding + self.num_layers * (attention + feed_forward + norms) + self.hidden_dim

    def to_dict(self) -> dict[str, Any]:
        """The hyperparameters by name, as `Gemma2Backbone` takes them."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The numbers that fix the vision tower of PaliGemma 2, which turns an image into tokens.

    Args:
        image_size: pixels of a side of the image, a multiple of `patch_size`.
        patch_size: pixels of a side of a patch; each becomes a token.
        num_layers: encoder blocks.
        num_heads: attention heads, a divisor of `hidden_dim`.
        hidden_dim: width of the tower.
        intermediate_dim: width of the feed-forward branch.

    Raises:
        ValueError: if a number is outside what is allowed; the message names it.

    Example:

    >>> vision = VisionConfig(224, patch_size=14, num_layers=27, num_heads=16, hidden_dim=1152, intermediate_dim=4304)
    >>> vision.num_image_tokens, vision.parameter_count
    (256, 412442352)

    Source: SigLIP (https://arxiv.org/abs/2303.15343), So400m/14 as PaliGemma 2 (https://arxiv.org/abs/2412.03555) uses
    it: biases everywhere, learned positions, a norm at the end, no pooling.
    """

    image_size: int
    patch_size: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    intermediate_dim: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _require(self, field.name, _is_whole(getattr(self, field.name)), "a whole number of at least 1")
        for name, part in (("image_size", "patch_size"), ("hidden_dim", "num_heads")):
            _require(self, name, getattr(self, name) % getattr(self, part) == 0, f"a multiple of `{part}`")

    @property
    def num_image_tokens(self) -> int:
        """Tokens that an image becomes."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def parameter_count(self) -> int:
        """Number of weights of the tower, the projection to the text width not among them."""
        width = self.hidden_dim
        patches = 3 * self.patch_size**2 * width + width
        attention = 4 * (width * width + width)
        feed_forward = 2 * width * self.intermediate_dim + self.intermediate_dim + width
        # Two norms in each block and one behind the last, a scale and an offset each.
        norms = (2 * self.num_layers + 1) * 2 * width
        return patches + self.num_image_tokens * width + self.num_layers * (attention + feed_forward) + norms

    def projector_count(self, text_dim: int) -> int:
        """Number of weights of the projection from the tower to a text model's width."""
        return self.hidden_dim * text_dim + text_dim


_WHOLE = (
    "vocabulary_size",
    "num_layers",
    "num_query_heads",
    "num_key_value_heads",
    "hidden_dim",
    "intermediate_dim",
    "head_dim",
    "sliding_window_size",
    "context_length",
)
_POSITIVE = ("query_pre_attention_scalar", "layer_norm_epsilon", "rope_max_wavelength")


# No model has more layers, and floats count no further.
_MOST_LAYERS, _LARGEST = 10_000, 2**53


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: object) -> bool:
    # A comparison is exact for whole numbers beyond all floats, too.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _require(config: Any, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {allowed}; given {getattr(config, name)!r}.")
