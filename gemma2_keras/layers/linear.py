"""A bias-free linear layer that keeps its weight as checkpoints do, with an optional low-rank adapter."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from gemma2_keras.kernels import linear
from gemma2_keras.layers.initialization import weight_initializer


@keras.saving.register_keras_serializable(package="gemma2_keras")
class Linear(keras.layers.Layer):
    """`y = x W^T` with `W` of shape (out, in), the layout of checkpoints and the one a CPU streams fastest.

    Args:
        units: size of the output's last axis.
        **kwargs: `name`, `dtype` and the like, as `keras.layers.Layer` takes them.

    Example:

    >>> import numpy as np
    >>> layer = Linear(3)
    >>> tuple(layer(np.ones((2, 5), "float32")).shape), tuple(layer.weight.shape)
    ((2, 3), (3, 5))
    """

    def __init__(self, units: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.lora_rank: int | None = None
        self.lora_scale = 0.0

    def build(self, input_shape) -> None:
        """Make the (out, in) weight."""
        self.weight = self.add_weight(
            name="weight", shape=(self.units, input_shape[-1]), initializer=weight_initializer()
        )

    def call(self, x):
        """(…, in) -> (…, out)."""
        y = linear(x, self.weight)
        if self.lora_rank is None:
            return y
        # Two thin products in the adapter's float32; the (out, in) delta is never made.
        thin = ops.matmul(ops.cast(x, "float32"), ops.transpose(self.lora_a))
        delta = ops.matmul(thin, ops.transpose(self.lora_b)) * self.lora_scale
        return y + ops.cast(delta, y.dtype)

    def compute_output_shape(self, input_shape):
        """(…, in) -> (…, out)."""
        return (*input_shape[:-1], self.units)

    def check_lora(self, rank: int, alpha: float | None = None) -> None:
        """Refuse what `enable_lora` cannot take, changing nothing.

        Raises:
            ValueError: as `enable_lora`.
        """
        if not self.built:
            raise ValueError(f"Layer {self.name!r} has no weight yet: call or build the model before `enable_lora`.")
        if self.lora_rank is not None:
            raise ValueError(f"Layer {self.name!r} already has an adapter of rank {self.lora_rank}.")
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"`rank` must be a whole number of at least 1; given {rank!r}.")
        if alpha is not None and not (isinstance(alpha, int | float) and 0 < alpha < float("inf")):
            raise ValueError(f"`alpha` must be a number above 0; given {alpha!r}.")

    def enable_lora(self, rank: int, alpha: float | None = None) -> None:
        """Freeze the weight and add a trainable low-rank adapter, `y += (alpha / rank) x A^T B^T`.

        `A` starts uniform in ±1/sqrt(in) and `B` at zero, so that the output is at first unchanged. `A` is drawn by
        NumPy's global generator, which `keras.utils.set_random_seed` seeds: the start is the same on every backend.

        Args:
            rank: width R of the adapter, at least 1.
            alpha: numerator of the factor on the adapter's output; `None` is `rank`, which makes the factor 1.

        Raises:
            ValueError: if the layer is not built, has an adapter already, or `rank` or `alpha` is not above 0.

        Source: LoRA (https://arxiv.org/abs/2106.09685).
        """
        self.check_lora(rank, alpha)
        width = self.weight.shape[1]
        bound = width**-0.5
        # A built layer takes no new weights unless its tracker is opened, as Keras' own adapters do.
        self._tracker.unlock()
        self.lora_a = self.add_weight(
            name="lora_a",
            shape=(rank, width),
            dtype="float32",
            autocast=False,
            initializer=lambda shape, dtype: ops.convert_to_tensor(np.random.uniform(-bound, bound, shape), dtype),
        )
        self.lora_b = self.add_weight(
            name="lora_b", shape=(self.units, rank), dtype="float32", autocast=False, initializer="zeros"
        )
        self._tracker.lock()
        self.weight.trainable = False
        self.lora_rank = rank
        self.lora_scale = (rank if alpha is None else alpha) / rank

    def merged_weight(self) -> np.ndarray:
        """The (out, in) weight with the adapter, if any, added in: what a saved model holds."""
        weight = ops.convert_to_numpy(self.weight)
        if self.lora_rank is None:
            return weight
        delta = ops.convert_to_numpy(self.lora_b) @ ops.convert_to_numpy(self.lora_a) * self.lora_scale
        return (weight.astype("float32") + delta).astype(weight.dtype)

    def save_own_variables(self, store) -> None:
        """Write the weight, and the adapter beside it if there is one."""
        store["0"] = self.weight
        if self.lora_rank is not None:
            store["lora_a"], store["lora_b"] = self.lora_a, self.lora_b
            store["lora_scale"] = np.asarray(self.lora_scale, "float32")

    def load_own_variables(self, store) -> None:
        """Read what `save_own_variables` wrote; an adapter that the file lacks starts from no effect.

        Raises:
            ValueError: if the file has an adapter and the layer has none, or one of another rank.
        """
        stored = store["lora_a"].shape[0] if "lora_a" in store.keys() else None  # noqa: SIM118 (no mapping)
        if stored not in (None, self.lora_rank):
            raise ValueError(
                f"The file has an adapter of rank {stored} for layer {self.name!r}, whose own is {self.lora_rank}: "
                f"call `enable_lora({stored})` before loading."
            )
        if stored is not None and not np.isclose(np.asarray(store["lora_scale"]), self.lora_scale):
            raise ValueError(
                f"The file's adapter for {self.name!r} has alpha {np.asarray(store['lora_scale']) * stored:g}, the "
                f"layer's {self.lora_scale * stored:g}: give `enable_lora` the same `alpha` before loading."
            )
        self.weight.assign(store["0"])
        if stored is not None:
            self.lora_a.assign(store["lora_a"])
            self.lora_b.assign(store["lora_b"])
        elif self.lora_rank is not None:
            self.lora_b.assign(ops.zeros(self.lora_b.shape))

    def get_config(self) -> dict:
        """Constructor arguments."""
        return {**super().get_config(), "units": self.units}
