"""A bias-free linear layer that keeps its weight as checkpoints do, with low-rank adapters to choose from."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from gemma2_keras.kernels import array, linear, stored
from gemma2_keras.layers.initialization import weight_initializer
from gemma2_keras.layers.lean import LeanLayer
from gemma2_keras.layers.low_rank import Adapter, LowRank

# The adapter of `enable_lora`, unless told otherwise.
DEFAULT_ADAPTER = "default"


@keras.saving.register_keras_serializable(package="gemma2_keras")
class Linear(LeanLayer):
    """`y = x W^T` with `W` of shape (out, in), the layout of checkpoints and the one a CPU streams fastest.

    Adapters are held by name; at most one is in effect, and the others cost nothing.

    Args:
        units: size of the output's last axis.
        **kwargs: `name`, `dtype` and the like, as `keras.layers.Layer` takes them.

    Attributes:
        adapters: every `Adapter`, by name.
        selected: name of the one chosen, or `None`.
        enabled: whether the chosen one is in effect.

    Example:

    >>> import numpy as np
    >>> layer = Linear(3)
    >>> tuple(layer(np.ones((2, 5), "float32")).shape), tuple(layer.weight.shape)
    ((2, 3), (3, 5))
    """

    def __init__(self, units: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.adapters: dict[str, Adapter] = {}
        self.selected: str | None = None
        self.enabled = True
        # The weight as it was before an adapter was merged into it.
        self._base: np.ndarray | None = None

    def build(self, input_shape) -> None:
        """Make the (out, in) weight."""
        self.weight = self.add_weight(
            name="weight", shape=(self.units, input_shape[-1]), initializer=weight_initializer()
        )

    def call(self, x, training=None):
        """(…, in) -> (…, out)."""
        y = linear(x, self.weight)
        adapter = self.adapter
        return y if adapter is None else adapter.adapted(x, y, self.weight, training)

    def compute_output_shape(self, input_shape):
        """(…, in) -> (…, out)."""
        return (*input_shape[:-1], self.units)

    # Adapters

    @property
    def adapter(self) -> Adapter | None:
        """The adapter that `call` applies: the chosen one, unless it is disabled or merged."""
        return self._selected_adapter if self.enabled and self._base is None else None

    @property
    def _selected_adapter(self) -> Adapter | None:
        return None if self.selected is None else self.adapters[self.selected]

    @property
    def lora_rank(self) -> int | None:
        """Rank of the chosen adapter; `None` if there is none."""
        return None if self._selected_adapter is None else self._selected_adapter.spec.rank

    @property
    def lora_scale(self) -> float:
        """Factor on the chosen adapter's output; 0 if there is none."""
        return 0.0 if self._selected_adapter is None else self._selected_adapter.spec.scale

    @property
    def lora_a(self) -> Any:
        """(R, in) variable of the chosen adapter; `None` if there is none."""
        return None if self._selected_adapter is None else self._selected_adapter.a

    @property
    def lora_b(self) -> Any:
        """(out, R) variable of the chosen adapter; `None` if there is none."""
        return None if self._selected_adapter is None else self._selected_adapter.b

    def enable_lora(self, rank: int, alpha: float | None = None) -> None:
        """Freeze the weight and add a trainable adapter, as Keras' own layers do.

        Args:
            rank: width R of the adapter, at least 1.
            alpha: numerator of the factor on the adapter's output; `None` is `rank`, which makes the factor 1.

        Raises:
            ValueError: if the layer is not built, has such an adapter already, or `rank` or `alpha` is not above 0.
        """
        self.add_adapter(DEFAULT_ADAPTER, LowRank(rank, alpha))
        self.select(DEFAULT_ADAPTER)

    def add_adapter(self, name: str, spec: LowRank) -> None:
        """Freeze the weight and hold one more adapter, without choosing it.

        `A` starts uniform in ±1/sqrt(in) and `B` at zero, so that the output is at first unchanged. `A` is drawn by
        NumPy's global generator, which `keras.utils.set_random_seed` seeds: the start is the same on every backend.

        Args:
            name: of letters, digits, `_` and `-`.
            spec: the adapter's hyperparameters.

        Raises:
            ValueError: if the layer is not built, or has an adapter of this name.
        """
        if not self.built:
            raise ValueError(f"Layer {self.name!r} has no weight yet: call or build the model before `enable_lora`.")
        if name in self.adapters:
            raise ValueError(f"Layer {self.name!r} already has an adapter {name!r}.")
        units, width = self.weight.shape
        bound = width**-0.5
        shapes = {"lora_a": (spec.rank, width), "lora_b": (units, spec.rank)}
        if spec.use_dora:
            shapes["lora_magnitude"] = (units,)
        # A built layer takes no new weights unless its tracker is opened, as Keras' own adapters do.
        self._tracker.unlock()
        variables = [
            self.add_weight(name=_key(part, name), shape=shape, dtype="float32", autocast=False, initializer="zeros")
            for part, shape in shapes.items()
        ]
        seed = keras.random.SeedGenerator() if spec.dropout else None
        self._tracker.track(seed)
        self._tracker.lock()
        adapter = Adapter(spec, *variables, seed=seed)
        adapter.a.assign(np.random.uniform(-bound, bound, adapter.a.shape).astype("float32"))
        adapter.reset(self.weight)
        self.adapters[name] = adapter
        self.weight.trainable = False

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter, if the layer has one of this name; if it is merged, it stays in the weight."""
        if name not in self.adapters:
            return
        adapter = self.adapters.pop(name)
        for variable in adapter.variables.values():
            self._untrack_variable(variable)
        self._tracker.untrack(adapter.seed)
        if self.selected == name:
            self.selected = self._base = None

    def select(self, name: str | None, trainable: bool = True) -> None:
        """Choose an adapter by name; the others are frozen.

        Args:
            name: of the adapter; if the layer has none of this name, it works without.
            trainable: whether the chosen one is trainable.
        """
        self.selected = name if name in self.adapters else None
        for key, adapter in self.adapters.items():
            for variable in adapter.variables.values():
                variable.trainable = trainable and key == name

    def merge(self) -> None:
        """Fold the adapter in effect, if any, into the weight; the weight as it was is kept in the host's memory."""
        if self.adapter is None:
            return
        merged = self.merged_weight()
        # On PyTorch the array would otherwise share the weight's memory.
        self._base = np.array(ops.convert_to_numpy(self.weight))
        self.weight.assign(merged)

    def unmerge(self) -> None:
        """Bring back the weight, bit for bit, as it was before `merge`."""
        if self._base is not None:
            self.weight.assign(self._base)
            self._base = None

    def merged_weight(self) -> np.ndarray:
        """The (out, in) weight with the adapter in effect, if any, folded in: what a saved model holds."""
        weight = array(stored(self.weight))
        return weight if self.adapter is None else self.adapter.merged(weight)

    def base_weight(self) -> np.ndarray:
        """The (out, in) weight without any adapter, though one be merged."""
        return array(stored(self.weight)) if self._base is None else self._base

    # Saving

    def save_own_variables(self, store) -> None:
        """Write the weight, unmerged, and the adapters beside it."""
        store["0"] = self.weight if self._base is None else self._base
        for name, adapter in self.adapters.items():
            for part, variable in adapter.variables.items():
                store[_key(part, name)] = variable
            store[_key("lora_scale", name)] = np.asarray(adapter.spec.scale, "float32")

    def load_own_variables(self, store) -> None:
        """Read what `save_own_variables` wrote; an adapter that the file lacks starts from no effect.

        Raises:
            ValueError: if the file has an adapter that the layer has not, or one of another kind, or one is merged.
        """
        if self._base is not None:
            raise ValueError(f"Layer {self.name!r} has a merged adapter: unmerge it before loading weights.")
        keys = set(store.keys())
        held = {name: {part: _key(part, name) for part in self.adapters[name].variables} for name in self.adapters}
        for name, parts in held.items():
            if parts["lora_a"] in keys:
                self._check_stored(store, keys, name)
        known = {key for name, parts in held.items() for key in (*parts.values(), _key("lora_scale", name))}
        unknown = min((key for key in keys - known if key.startswith("lora_")), default=None)
        if unknown is not None:
            _, _, name = unknown.removeprefix("lora_").partition("_")
            rank = store[_key("lora_a", name or DEFAULT_ADAPTER)].shape[0]
            named = f", name={name!r}" if name else ""
            raise ValueError(
                f"The file has an adapter of rank {rank} for layer {self.name!r}, which has none such: call "
                f"`enable_lora({rank}{named})` before loading, with the same options."
            )
        self.weight.assign(store["0"])
        for name, parts in held.items():
            if parts["lora_a"] not in keys:
                self.adapters[name].reset(self.weight)
                continue
            for part, key in parts.items():
                self.adapters[name].variables[part].assign(store[key])

    def _check_stored(self, store: Any, keys: set[str], name: str) -> None:
        """Refuse a file whose adapter `name` is of another kind than the layer's."""
        spec = self.adapters[name].spec
        rank, scale = store[_key("lora_a", name)].shape[0], np.asarray(store[_key("lora_scale", name)])
        if rank != spec.rank:
            raise ValueError(
                f"The file has an adapter of rank {rank} for layer {self.name!r}, whose own is {spec.rank}: "
                f"call `enable_lora({rank})` before loading."
            )
        if not np.isclose(scale, spec.scale):
            raise ValueError(
                f"The file's adapter for {self.name!r} has the factor {scale:g}, the layer's {spec.scale:g}: give "
                "`enable_lora` the same `alpha` and `use_rslora` before loading."
            )
        if (_key("lora_magnitude", name) in keys) != spec.use_dora:
            raise ValueError(f"The file's adapter for {self.name!r} needs the same `use_dora` in `enable_lora`.")

    def get_config(self) -> dict:
        """Constructor arguments."""
        return {**super().get_config(), "units": self.units}


def _key(part: str, name: str) -> str:
    """What a part of an adapter is called among the layer's weights, in paths and in files."""
    return part if name == DEFAULT_ADAPTER else f"{part}_{name}"
