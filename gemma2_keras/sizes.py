"""Arithmetic on the sizes of a model: its weights, its cache and what runs through it. Imports no Keras."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gemma2_keras.config import Gemma2Config, VisionConfig

# Slots of a ring beyond its window: so many tokens can be rolled back before one is lost that is still to be seen.
SPARE = 64
# Longest stretch of a prompt that runs at once: attention's scores then grow with the prompt, not with its square.
CHUNK = 512
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_MIXED = "mixed_"


class Precision(NamedTuple):
    """Bytes of one number under a dtype policy.

    Attributes:
        weight: of a weight as it is kept.
        compute: of what is computed from it, and of the cache.
    """

    weight: int
    compute: int


def precision(dtype: Any) -> Precision:
    """The bytes of a dtype policy, or of its name.

    Raises:
        ValueError: if the model does not compute in it.

    >>> precision("mixed_bfloat16")
    Precision(weight=4, compute=2)
    """
    name = str(getattr(dtype, "name", dtype))
    kept, compute = ("float32", name.removeprefix(_MIXED)) if name.startswith(_MIXED) else (name, name)
    if compute not in _ITEM_BYTES or name == f"{_MIXED}float32":
        raise ValueError(
            f"`dtype` must be one of {', '.join(_ITEM_BYTES)}, mixed_bfloat16 and mixed_float16; given {name[:40]!r}."
        )
    return Precision(_ITEM_BYTES[kept], _ITEM_BYTES[compute])


def projection_shapes(config: Gemma2Config) -> dict[str, tuple[int, int]]:
    """(out, in) of each projection of a decoder block, by its name in checkpoints."""
    queries, keys = config.num_query_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    width, inner = config.hidden_dim, config.intermediate_dim
    return {
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }


def parameter_parts(config: Gemma2Config, vision: VisionConfig | None = None) -> dict[str, int]:
    """Number of weights of each part of a model, the tied embedding counted once.

    >>> config = Gemma2Config(64, 2, 4, 2, 24, 40, 8)
    >>> parameter_parts(config)
    {'embedding': 1536, 'attention': 4608, 'feed-forward': 5760, 'norms': 216}
    """
    sizes = {name: math.prod(shape) for name, shape in projection_shapes(config).items()}
    attention = sum(sizes.pop(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    parts = {
        "embedding": config.vocabulary_size * config.hidden_dim,
        "attention": config.num_layers * attention,
        "feed-forward": config.num_layers * sum(sizes.values()),
        "norms": (4 * config.num_layers + 1) * config.hidden_dim,
    }
    if vision is not None:
        parts["vision tower"] = vision.parameter_count
        parts["projector"] = vision.projector_count(config.hidden_dim)
    return parts


def adapter_count(config: Gemma2Config, rank: int, modules: Iterable[str], dora: bool = False) -> int:
    """Number of weights of low-rank adapters.

    Args:
        config: the model's hyperparameters.
        rank: width R of each adapter.
        modules: names of the projections that have one, with or without what stands before the last dot.
        dora: whether each row of the adapted weights has a length, too.
    """
    shapes = projection_shapes(config)
    sizes = (shapes[module.rpartition(".")[2]] for module in modules)
    return sum(rank * (out + inputs) + out * dora for out, inputs in sizes)


def slot_counts(config: Gemma2Config, length: int, spare: int = SPARE) -> list[int]:
    """Slots of each layer in a cache for rows of up to `length` tokens: a local layer needs a ring of its window."""
    ring = min(length, config.sliding_window_size + spare)
    return [ring if config.is_local(i) else length for i in range(config.num_layers)]


def cache_bytes(config: Gemma2Config, rows: int, length: int, dtype: Any, spare: int = SPARE) -> int:
    """Size of a cache, known before it is made.

    Args:
        config: the model's hyperparameters.
        rows: rows B of the batch.
        length: tokens that each row has room for.
        dtype: of keys and values, or the policy of the model.
        spare: slots of a ring beyond its window.

    >>> config = Gemma2Config(vocabulary_size=256000, num_layers=26, num_query_heads=8, num_key_value_heads=4,
    ...                       hidden_dim=2304, intermediate_dim=9216, head_dim=256)
    >>> cache_bytes(config, rows=1, length=1000, dtype="bfloat16")
    106496000
    """
    pair = 2 * config.num_key_value_heads * config.head_dim * precision(dtype).compute
    return rows * pair * sum(slot_counts(config, length, spare))


def bucket(length: int) -> int:
    """The length that is compiled for where shapes are compiled in, not below this one: a power of two, from 64 on."""
    return max(64, 1 << (length - 1).bit_length())


def prompt_bytes(config: Gemma2Config, tokens: int, keys: int, compute: int, scores: bool) -> int:
    """What runs through the model at once while a stretch of a prompt is run.

    Args:
        config: the model's hyperparameters.
        tokens: tokens of the stretch.
        keys: tokens that the last of them sees.
        compute: bytes of a number that is computed.
        scores: whether attention makes its (N, T, S) scores, which a kernel does not.
    """
    shapes = projection_shapes(config)
    # The keys and values of all layers wait until they are written into the cache.
    waiting = config.num_layers * 2 * shapes["k_proj"][0]
    # Sums are float32 while a projection is made, whatever they become.
    made = (2 * config.hidden_dim + 2 * config.intermediate_dim) * compute + config.intermediate_dim * 4
    matrices = _SCORES * 4 * config.num_query_heads * keys if scores else 0
    return tokens * (waiting * compute + made + matrices)


# Matrices of scores alive at once where they are made: raw, capped and softmax.
_SCORES = 3


# What a process was measured to hold for each byte that the gradient needs, 1.34 to 1.9: the backends' own intermediate
# results, and gaps between tensors.
_HELD = 1.5


def training_bytes(
    config: Gemma2Config,
    rows: int,
    length: int,
    compute: int,
    adapted: Mapping[str, int] | None,
    scores: bool,
    remat: bool,
) -> int:
    """What a step of training keeps for its gradient, and what it makes of that at once.

    Args:
        config: the model's hyperparameters.
        rows: examples B of the batch.
        length: tokens T of each.
        compute: bytes of a number that is computed.
        adapted: for each projection how many layers have an adapter on it; `None` if all weights are trained.
        scores: whether attention makes its (B, N, T, T) scores, which a kernel does not.
        remat: whether a branch is computed again for its gradient.
    """
    shapes, width, layers = projection_shapes(config), config.hidden_dim, config.num_layers
    queries, keys, inner = shapes["q_proj"][0], shapes["k_proj"][0], config.intermediate_dim
    # Two norms in each branch keep their input as float32, and with weights of their own the normalised one, too.
    norms = 2 * width * 4 * (2 if adapted is None else 1)
    # Queries, keys, values and what is mixed of them; the gate, its activation and what it is multiplied with.
    attention, feed_forward = norms + (2 * queries + 2 * keys) * compute, norms + 3 * inner * compute
    if scores:
        # Capped scores and softmax as float32, and weights of another dtype.
        attention += config.num_query_heads * length * (8 + (compute if compute != 4 else 0))
    if adapted is None:
        attention += width * compute
        feed_forward += (width + inner) * compute
    else:
        # An adapter keeps its input as float32, which is a copy where the model computes in less.
        share = {name: count / layers for name, count in adapted.items()}
        groups = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
        for group in groups:
            each = [share.get(name, 0.0) for name in group]
            kept = 4 * shapes[group[0]][1] * (max(each) if compute == 4 else sum(each))
            if group[0] in ("q_proj", "o_proj"):
                attention += kept
            else:
                feed_forward += kept
    once = (2 * width + 3 * inner) * max(compute, 2)
    branches = attention + feed_forward
    kept = layers * 2 * width * compute + max(attention, feed_forward) if remat else layers * branches
    return math.ceil(_HELD * rows * length * (kept + once))


def readable(size: float) -> str:
    """Bytes for people.

    >>> readable(5_228_683_776), readable(1_400_000), readable(64)
    ('5.23 GB', '1.40 MB', '64 bytes')
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.{2 if size < 10 * factor else 1 if size < 100 * factor else 0}f} {unit}"
    return f"{size:.0f} bytes"
