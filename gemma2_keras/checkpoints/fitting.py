"""Whether a model fits into memory, asked before anything is downloaded or allocated."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

from gemma2_keras.checkpoints.catalogue import Preset, describe_preset, list_presets
from gemma2_keras.checkpoints.description import Section, as_table, html_table, plain_text
from gemma2_keras.checkpoints.guard import shown
from gemma2_keras.config import Gemma2Config, VisionConfig
from gemma2_keras.errors import PresetError, WontFit, warn
from gemma2_keras.kernels import STATIC_SHAPES
from gemma2_keras.layers.low_rank import LowRank
from gemma2_keras.memory import available_bytes
from gemma2_keras.models.adapters import DEFAULT_LORA_TARGETS, chosen_modules
from gemma2_keras.ops.cross_entropy import tokens_at_once
from gemma2_keras.sizes import (
    CHUNK,
    adapter_count,
    bucket,
    cache_bytes,
    parameter_parts,
    precision,
    projection_shapes,
    prompt_bytes,
    readable,
    training_bytes,
)

# Set to "off", no model is refused or warned of.
CHECK = "GEMMA2_KERAS_MEMORY_CHECK"
# Tokens of the shortest conversation worth loading a model for.
_SHORT = 512
# Rows or tokens that are believed.
_MOST = 10**9
# Share of the memory that should be left for what runs beside the weights.
_SPARE = 0.1
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass(frozen=True, repr=False)
class MemoryEstimate:
    """What a model needs of memory, in bytes by part; printed, it is a table.

    Attributes:
        weights: of the model, as they are kept.
        adapters: of low-rank adapters, which are float32.
        cache: keys and values of past tokens, the local layers' in rings.
        activations: what runs through the layers at once and, in training, is kept for the gradient.
        logits: what the output projection and the loss make at once.
        gradients: of what is trained.
        optimizer: the two moments that Adam keeps.
        step: what Adam makes of gradients and moments on the way to new weights.

    Example:

    >>> MemoryEstimate(weights=5_228_683_776, cache=657_719_296)
    weights  5.23 GB
    cache     658 MB
    total    5.89 GB

    Example:

    >>> estimate = MemoryEstimate(weights=5_228_683_776, cache=54_525_952)
    >>> estimate.total
    5283209728
    """

    weights: int
    adapters: int = 0
    cache: int = 0
    activations: int = 0
    logits: int = 0
    gradients: int = 0
    optimizer: int = 0
    step: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(dataclasses.asdict(self).values())

    def __str__(self) -> str:
        return plain_text(as_table(self._section(), numbers=(1,)))

    # What an interpreter shows of a value is its representation.
    __repr__ = __str__

    def __rich__(self) -> Any:
        return as_table(self._section(), numbers=(1,))

    def _repr_html_(self) -> str:
        return html_table(self._section())

    def _section(self) -> Section:
        parts = {name: size for name, size in dataclasses.asdict(self).items() if size}
        return Section("", [(name, readable(size)) for name, size in {**parts, "total": self.total}.items()])


def estimate_memory(
    name: Any,
    dtype: Any = None,
    batch: int = 1,
    context: int | None = None,
    adapters: Any = None,
    train: bool = False,
    *,
    remat: bool = False,
) -> MemoryEstimate:
    """What a model will need of memory, before it is downloaded or built.

    Weights, adapters, cache, gradients and moments are counted exactly, activations and logits by what the layers keep.
    Not counted are libraries, compiled programs and what backends keep for themselves (0.1 to 0.4 GB on a CPU beside
    1 GB of libraries), what loading holds for a moment (a tensor or two), and what an image takes on its way through a
    vision tower. Beside the libraries, processes with a model of 0.5 to 0.9 GB on a CPU were measured to hold 1.00 to
    1.19 times the estimate when adapters were trained; when text was generated, 1.04 times on PyTorch, 1.14 on
    TensorFlow and 1.46 on JAX, whose programs weigh little beside a published model. On PyTorch it was 1.5 times with
    `remat`, and 1.04 times when all weights were trained.

    Args:
        name: a preset's name, a `Gemma2Config`, or a folder with a checkpoint.
        dtype: a Keras dtype policy or its name; `None` is the preset's or checkpoint's, or else Keras' own.
        batch: rows that are generated, or trained on, at once.
        context: tokens of a row, prompt and continuation together; `None` is all that the model is made for.
        adapters: a rank, or what `enable_lora` is given, such as `{"rank": 8, "targets": "all-linear"}`; `None` for
            none.
        train: whether `fit` is to run, with Adam and the default loss, on the adapters or else on all weights.
        remat: whether it is to compute each branch again for its gradient, as `compile(remat=True)` asks.

    Raises:
        PresetError: if `name` leads nowhere, or to something that would have to be downloaded first.
        ValueError: if another argument is outside what is allowed.

    Example:

    >>> estimate = estimate_memory("gemma2_2b_en", "bfloat16", context=1000, adapters=8)
    >>> estimate.weights, estimate.adapters
    (5228683776, 6389760)
    """
    config, vision, usual = _described(name)
    dtype = usual if dtype is None else dtype
    sizes = precision(dtype)
    for argument, value in (("batch", batch), ("context", config.context_length if context is None else context)):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
            raise ValueError(f"`{argument}` must be a whole number from 1 to {_MOST:,}; given {shown(value)}.")
    for argument, value in (("train", train), ("remat", remat)):
        if not isinstance(value, bool):
            raise ValueError(f"`{argument}` must be True or False; given {shown(value)}.")
    length = config.context_length if context is None else context
    if length > config.context_length:
        raise ValueError(f"`context` is {length}; the model is made for {config.context_length} tokens.")
    parts = parameter_parts(config, vision)
    modules, adapter = _adapted(config, adapters)
    shared = {"weights": sum(parts.values()) * sizes.weight, "adapters": adapter * 4}
    # Under a mixed policy what is computed with is another copy: of all weights for a gradient, of the largest without.
    copied = sizes.compute if sizes.compute != sizes.weight else 0
    if not train:
        room = bucket(length) if STATIC_SHAPES else length
        through = prompt_bytes(config, min(CHUNK, batch * room), room, sizes.compute, _makes_scores())
        return MemoryEstimate(
            **shared,
            cache=cache_bytes(config, batch, room, dtype),
            activations=through + copied * parts["embedding"],
            logits=2 * batch * config.vocabulary_size * 4,
        )
    trained = adapter * 4 if modules else shared["weights"]
    counts = {name: sum(m.endswith(name) for m in modules) for name in projection_shapes(config)} if modules else None
    # On a CPU XLA joins what is computed again with what was computed before, and keeps it all.
    remat = remat and (keras.backend.backend() != "jax" or _on_accelerator())
    kept = training_bytes(config, batch, length, sizes.compute, counts, _makes_scores(), remat)
    return MemoryEstimate(
        **shared,
        activations=kept + copied * sum(parts.values()),
        logits=_loss_bytes(config, batch * length, sizes.compute, whole=not modules),
        gradients=trained,
        optimizer=2 * trained,
        step=2 * trained,
    )


def require_fit(
    config: Gemma2Config, dtype: Any = None, name: str | None = None, vision: VisionConfig | None = None
) -> None:
    """See to it, before a model is downloaded or built, that its weights fit into the memory that is free.

    That is the memory of the GPU where the backend computes on one, and else the machine's or its container's. Nothing
    is checked where neither is known, under a `keras.distribution`, whose layout decides what each device holds, and
    with `GEMMA2_KERAS_MEMORY_CHECK=off` in the environment.

    Args:
        config: the architecture.
        dtype: a Keras dtype policy or its name, that the weights will get; `None` is Keras' own.
        name: what the user asked for, if it is a preset's name.
        vision: of an image-text model.

    Raises:
        WontFit: if the weights alone need more; the message has what would fit.

    Warns:
        UserWarning: if a short conversation would leave less than a tenth of it.
    """
    if os.environ.get(CHECK, "").lower() == "off" or keras.distribution.distribution() is not None:
        return
    free, where = _free()
    if free is None:
        return
    dtype = keras.config.dtype_policy() if dtype is None else dtype
    sizes = precision(dtype)
    weights = sum(parameter_parts(config, vision).values()) * sizes.weight
    if weights > free:
        raise WontFit(
            f"{_called(name)} needs {readable(weights)} for its weights in {_name(dtype)}, and {readable(free)} of the "
            f"memory of the {where} are free. {_instead(config, vision, sizes.weight, name, free)} {CHECK}=off tries "
            "all the same."
        )
    tokens = min(_SHORT, config.context_length)
    needed = weights + cache_bytes(config, 1, tokens, dtype) + 2 * config.vocabulary_size * 4
    if needed > (1 - _SPARE) * free:
        warn(
            f"{_called(name)} needs {readable(needed)} in {_name(dtype)} for its weights and a short conversation, and "
            f"{readable(free)} of the memory of the {where} are free. "
            f"{_instead(config, vision, sizes.weight, name, free)}"
        )


def _called(name: str | None) -> str:
    return "The model" if name is None else name


def _name(dtype: Any) -> str:
    return str(getattr(dtype, "name", dtype))


def _instead(config: Gemma2Config, vision: VisionConfig | None, weight: int, name: str | None, free: int) -> str:
    """What would fit, as a sentence."""
    room, ways = (1 - _SPARE) * free, []
    count = sum(parameter_parts(config, vision).values())
    if weight > 2 and 2 * count <= room:
        ways.append(f'dtype="bfloat16", which takes {readable(2 * count)}')
    smaller = _smaller(count, name, vision, room)
    if smaller is not None:
        taken = smaller.parameters * precision(smaller.dtype).weight
        ways.append(f"{smaller.name}, which takes {readable(taken)} in {smaller.dtype}")
    return f"What would fit: {'; or '.join(ways)}." if ways else "No smaller dtype or preset would fit."


def _smaller(count: int, name: str | None, vision: VisionConfig | None, room: float) -> Preset | None:
    """The largest smaller preset of the kind that fits; among equals the one whose name is most like this one's."""
    presets = [describe_preset(other) for other in list_presets()]
    own = next((preset.kind for preset in presets if preset.name == name), "text" if vision is None else "image-text")
    fitting = [
        preset
        for preset in presets
        if preset.kind == own
        and preset.parameters < count
        and preset.parameters * precision(preset.dtype).weight <= room
    ]

    def rank(preset: Preset) -> tuple[int, float]:
        # Presets of one size may differ by some positions in the vision tower.
        return round(math.log2(preset.parameters)), difflib.SequenceMatcher(None, preset.name, name or "").ratio()

    return max(fitting, key=rank, default=None)


def _described(name: Any) -> tuple[Gemma2Config, VisionConfig | None, str]:
    """Architecture, vision tower and usual dtype of what the caller means."""
    if isinstance(name, Gemma2Config):
        return name, None, keras.config.dtype_policy().name
    if not isinstance(name, str | os.PathLike):
        raise PresetError(f"`name` must be a preset's name, a Gemma2Config or a folder; given {type(name).__name__}.")
    if os.fspath(name) in list_presets():
        preset = describe_preset(os.fspath(name))
        return preset.architecture, preset.vision, preset.dtype
    if "://" in os.fspath(name):
        raise PresetError(
            f"{os.fspath(name)!r} would have to be downloaded first: give the name of a preset, a Gemma2Config or a "
            "folder."
        )
    if Path(name).is_dir():
        # It asks `require_fit` in its turn.
        from gemma2_keras.checkpoints.presets import inspect_checkpoint

        config, dtype = inspect_checkpoint(name)
        return config, None, dtype
    describe_preset(os.fspath(name))
    raise AssertionError("unreachable: an unknown name was refused")


def _adapted(config: Gemma2Config, adapters: Any) -> tuple[list[str], int]:
    """The modules that get adapters, and how many weights those have."""
    if adapters is None:
        return [], 0
    asked: dict[str, Any]
    if isinstance(adapters, LowRank):
        asked = dataclasses.asdict(adapters)
    else:
        asked = dict(adapters) if isinstance(adapters, Mapping) else {"rank": adapters}
    targets = asked.pop("targets", None)
    asked.pop("name", None)
    try:
        spec = LowRank(**asked)
    except TypeError as error:
        raise ValueError(
            "`adapters` must be a rank, or what `enable_lora` takes: rank, targets, alpha, dropout, use_rslora, "
            f"use_dora; given {sorted(map(str, asked))}."
        ) from error
    names = [
        f"model.layers.{i}.{'self_attn' if projection in _ATTENTION else 'mlp'}.{projection}"
        for i in range(config.num_layers)
        for projection in projection_shapes(config)
    ]
    modules = chosen_modules(DEFAULT_LORA_TARGETS if targets is None else targets, names)
    return modules, adapter_count(config, spec.rank, modules, spec.use_dora)


def _loss_bytes(config: Gemma2Config, tokens: int, compute: int, whole: bool) -> int:
    """What the loss makes of the logits at once."""
    table = config.vocabulary_size * config.hidden_dim
    if _has_kernels() and not whole and (compute == 4 or keras.backend.backend() == "jax"):
        # A kernel makes the gradient of the states alone.
        return tokens * config.hidden_dim * 4
    logits = min(tokens, tokens_at_once(config.vocabulary_size)) * config.vocabulary_size
    # Logits and their shares, both float32, and the shares as they are multiplied with the table.
    return logits * (8 if compute == 4 else 8 + compute) + (4 * table if whole else 0)


def _makes_scores() -> bool:
    """Whether attention makes its scores: our CPU kernels do not."""
    return keras.backend.backend() == "tensorflow" or not _has_kernels()


def _has_kernels() -> bool:
    """Whether the CPU kernels run, as far as can be told without compiling them."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or ""]
    return bool(compiler[0]) and os.name == "posix" and not _on_accelerator()


def _on_accelerator() -> bool:
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return jax.default_backend() != "cpu"
    if backend == "torch":
        return keras.ops.zeros(()).device.type != "cpu"
    import tensorflow

    return bool(tensorflow.config.list_physical_devices("GPU") or tensorflow.config.list_physical_devices("TPU"))


def _free() -> tuple[int | None, str]:
    """Memory that is free where the backend computes, `None` if unknown, and where that is."""
    if not _on_accelerator():
        return available_bytes(), "machine"
    backend, free = keras.backend.backend(), None
    if backend == "torch":
        import torch

        if keras.ops.zeros(()).device.type == "cuda":
            free = torch.cuda.mem_get_info()[0]
    elif backend == "jax":
        import jax

        stats = jax.local_devices()[0].memory_stats() or {}
        if "bytes_limit" in stats:
            free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return free, "GPU"
