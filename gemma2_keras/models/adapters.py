"""The low-rank adapters of a backbone: which of its projections have one, and which one is in effect."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gemma2_keras.layers.linear import DEFAULT_ADAPTER, Linear
from gemma2_keras.layers.low_rank import LowRank

if TYPE_CHECKING:
    # What a backbone is otherwise, which `Adaptable` stands in front of.
    from keras_hub.models import Backbone as _Backbone
else:
    _Backbone = object

DEFAULT_LORA_TARGETS = ("q_proj", "v_proj")
ALL_LINEAR = "all-linear"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
# A decoder block's branches, as checkpoints name them.
_BRANCHES = {"attention": "self_attn", "feed_forward": "mlp"}


class Adaptable(_Backbone):
    """The part of a backbone that holds adapters by name, at most one of them in effect.

    Attributes:
        adapter_changes: grows whenever what the model computes has changed, which programs compiled before do not know.
        training_changes: grows whenever other weights are trainable than before.
    """

    adapter_changes = 0
    training_changes = 0
    transformer_layers: list[Any]
    # Whether each adapter is trainable while it is chosen.
    _adapters: Mapping[str, bool] = MappingProxyType({})
    _active: str | None = None
    _enabled = True
    _merged = False

    def linear_layers(self) -> dict[str, Linear]:
        """Every projection, by its module's name in a checkpoint, such as `model.layers.0.self_attn.q_proj`."""
        return {
            f"model.layers.{i}.{module}.{layer.name}": layer
            for i, block in enumerate(self.transformer_layers)
            for branch, module in _BRANCHES.items()
            for layer in getattr(block, branch)._flatten_layers(include_self=False)
            if isinstance(layer, Linear)
        }

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters held, in the order in which they came."""
        return list(self._adapters)

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter in effect, merged or not; `None` if there is none."""
        return self._active if self._enabled else None

    @property
    def selected_adapter(self) -> str | None:
        """Name of the adapter last chosen, disabled or not."""
        return self._active

    @property
    def is_merged(self) -> bool:
        """Whether the adapter in effect is folded into the weights."""
        return self._merged

    def default_lora_layer_names(self) -> list[str]:
        """The projections that `enable_lora` adapts unless told otherwise."""
        return list(DEFAULT_LORA_TARGETS)

    def enable_lora(
        self,
        rank,
        target_layer_names=None,
        alpha=None,
        dropout=0.0,
        *,
        use_rslora=False,
        use_dora=False,
        name=DEFAULT_ADAPTER,
    ) -> None:
        """Freeze the backbone and add trainable low-rank adapters to its projections.

        Args:
            rank: width of each adapter, at least 1.
            target_layer_names: names among `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj` and
                `down_proj`; `"all-linear"`; or patterns with `*`, `?` and `[0-3]` as file names have them, which
                must match the name of a checkpoint's module (`model.layers.0.self_attn.q_proj`), or its end from a
                dot on: `"layers.[0-3].*.q_proj"`. `None` is `q_proj` and `v_proj`.
            alpha: adapters' outputs are multiplied by `alpha / rank`; `None` is `rank`.
            dropout: rate on the adapters' inputs, in training.
            use_rslora: whether to multiply by `alpha / sqrt(rank)` instead.
            use_dora: whether the rows of the adapted weights get trainable lengths.
            name: of the adapter, of letters, digits, `_` and `-`. It is the one in effect from now on.

        Raises:
            ValueError: if a target names no projection, an option is outside what is allowed, there is an adapter of
                this name, or one is merged.

        Source: LoRA (https://arxiv.org/abs/2106.09685), rsLoRA (https://arxiv.org/abs/2312.03732), DoRA
        (https://arxiv.org/abs/2402.09353).
        """
        spec = LowRank(rank, alpha, dropout, use_rslora, use_dora)
        targets = DEFAULT_LORA_TARGETS if target_layer_names is None else target_layer_names
        self.add_adapter(name, dict.fromkeys(chosen_modules(targets, self.linear_layers()), spec))

    def add_adapter(self, name: str, specs: Mapping[str, LowRank], trainable: bool = True) -> None:
        """Freeze the backbone and add an adapter, which is the one in effect from now on.

        Args:
            name: of the adapter, of letters, digits, `_` and `-`.
            specs: the adapter's hyperparameters for each module that gets one, by the names of `linear_layers`.
            trainable: whether its weights are trainable.

        Raises:
            ValueError: if the name cannot be, there is an adapter of this name, or one is merged.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"An adapter's `name` must be of letters, digits, _ and -; given {name!r}.")
        if name in self._adapters:
            raise ValueError(f"The model already has an adapter {name!r}: give another `name`, or unload it first.")
        self._check_unmerged()
        layers = self.linear_layers()
        try:
            for module, spec in specs.items():
                layers[module].add_adapter(name, spec)
        except BaseException:
            for module in specs:
                layers[module].remove_adapter(name)
            raise
        self._adapters = {**self._adapters, name: bool(trainable)}
        self._activate(name)

    def remove_adapter(self, name: str | None = None) -> None:
        """Forget an adapter, or all; what is merged stays in the weights.

        Once the last one is gone the whole backbone is trainable.

        Raises:
            ValueError: if there is no adapter of this name.
        """
        gone = self.adapters if name is None else [self._known(name)]
        for layer in self.linear_layers().values():
            for adapter in gone:
                layer.remove_adapter(adapter)
        self._adapters = {key: trainable for key, trainable in self._adapters.items() if key not in gone}
        if self._active in gone:
            self._merged = False
            self._activate(None)
        else:
            self.adapter_changes += 1

    def set_adapter(self, name: str) -> None:
        """Let another adapter be the one in effect, and the one that is trained.

        Raises:
            ValueError: if there is no adapter of this name, or one is merged.
        """
        if self._known(name) == self.active_adapter:
            return
        self._check_unmerged()
        if name == self._active:
            self._enable(True)
        else:
            self._activate(name)

    def disable_adapter(self) -> None:
        """Compute without adapters until `set_adapter` or `enable_adapter`.

        Raises:
            ValueError: if an adapter is merged.
        """
        self._check_unmerged()
        if self.active_adapter is not None:
            self._enable(False)

    def enable_adapter(self) -> None:
        """Bring the adapter that `disable_adapter` disabled into effect again."""
        if not self._enabled:
            self._enable(True)

    def merge_adapter(self) -> None:
        """Fold the adapter in effect into the weights, so that it costs no time.

        The adapted weights are kept beside, in the host's memory, as they were: a bfloat16 weight could not be had
        back by subtraction. `remove_adapter` frees them.

        Raises:
            ValueError: if no adapter is in effect, or it is merged already.
        """
        self._check_unmerged()
        if self.active_adapter is None:
            raise ValueError("No adapter is in effect, so that there is nothing to merge.")
        layers = self.linear_layers().values()
        try:
            for layer in layers:
                layer.merge()
        except BaseException:
            for layer in layers:
                layer.unmerge()
            raise
        self._merged = True
        self.adapter_changes += 1

    def unmerge_adapter(self) -> None:
        """Bring back the weights, bit for bit, as they were before `merge_adapter`.

        Raises:
            ValueError: if no adapter is merged.
        """
        if not self._merged:
            raise ValueError("No adapter is merged.")
        for layer in self.linear_layers().values():
            layer.unmerge()
        self._merged = False
        self.adapter_changes += 1

    def adapter_specs(self, name: str) -> dict[str, LowRank]:
        """An adapter's hyperparameters for each of its modules.

        Raises:
            ValueError: if there is no adapter of this name.
        """
        layers = self.linear_layers()
        self._known(name)
        return {module: layer.adapters[name].spec for module, layer in layers.items() if name in layer.adapters}

    def adapter_config(self) -> dict[str, Any]:
        """All adapters without their weights, as plain values; `restore_adapters` makes them anew from it."""
        held = {}
        for name, trainable in self._adapters.items():
            groups: dict[LowRank, list[str]] = {}
            for module, spec in self.adapter_specs(name).items():
                groups.setdefault(spec, []).append(module)
            described = [{**dataclasses.asdict(spec), "modules": modules} for spec, modules in groups.items()]
            held[name] = {"trainable": trainable, "groups": described}
        return {"held": held, "selected": self._active, "enabled": self._enabled}

    def restore_adapters(self, config: Mapping[str, Any]) -> None:
        """Add what `adapter_config` described, with new weights."""
        for name, described in config["held"].items():
            groups = [dict(group) for group in described["groups"]]
            specs = {module: LowRank(**group) for group in groups for module in group.pop("modules")}
            self.add_adapter(name, specs, described["trainable"])
        self._activate(config["selected"])
        self._enable(config["enabled"])

    def _known(self, name: Any) -> str:
        if not isinstance(name, str) or name not in self._adapters:
            raise ValueError(f"There is no adapter {name!r}; the model has {self.adapters or 'none'}.")
        return name

    def _check_unmerged(self) -> None:
        if self._merged:
            raise ValueError(f"Adapter {self._active!r} is merged into the weights: call `unmerge_adapter()` first.")

    def _activate(self, name: str | None) -> None:
        """Choose an adapter, and make it the only part that is trainable; all is, where there are no adapters."""
        self._active = name
        layers = self.linear_layers().values()
        whole = not self._adapters
        self.trainable = True
        # Each layer by itself: TensorFlow ignores the assignment of what a layer's attribute is already, so that none
        # of the layers within would hear of it.
        for layer in self._flatten_layers(include_self=False):
            layer.trainable = whole
        for layer in layers:
            layer.trainable = whole or bool(layer.adapters)
            layer.weight.trainable = whole
        for layer in layers:
            layer.select(name, name is not None and self._adapters[name])
        self.training_changes += 1
        self._enable(True)

    def _enable(self, enabled: bool) -> None:
        self._enabled = enabled
        for layer in self.linear_layers().values():
            layer.enabled = enabled
        self.adapter_changes += 1


def chosen_modules(targets: Any, names: Iterable[str]) -> list[str]:
    """The modules among `names` that the targets choose."""
    patterns = list(targets) if isinstance(targets, list | tuple | set) else [targets]
    matched = [
        {name for name in names if pattern == ALL_LINEAR or fnmatchcase(f".{name}", f"*.{pattern}")}
        for pattern in patterns
        if isinstance(pattern, str)
    ]
    if not patterns or len(matched) != len(patterns) or not all(matched):
        projections = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(
            f"`target_layer_names` (of the task: `targets`) must be among {projections}, {ALL_LINEAR!r}, or patterns "
            f"of names such as {next(iter(names))}; given {patterns}."
        )
    chosen = set.union(*matched)
    return [name for name in names if name in chosen]
