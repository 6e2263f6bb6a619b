"""RMSNorm as a layer."""

from __future__ import annotations

import keras

from gemma2_keras.kernels import rms_norm
from gemma2_keras.layers.lean import LeanLayer


@keras.saving.register_keras_serializable(package="gemma2_keras")
class RMSNorm(LeanLayer):
    """Root-mean-square normalisation that multiplies by `1 + weight`, computed in float32 under any dtype policy.

    Args:
        epsilon: added to the mean square.
        **kwargs: as `keras.layers.Layer` takes them.

    Example:

    >>> import numpy as np
    >>> tuple(RMSNorm()(np.ones((2, 3, 4), "float32")).shape)
    (2, 3, 4)
    """

    def __init__(self, epsilon: float = 1e-6, **kwargs) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon

    def build(self, input_shape) -> None:
        """Make the (D,) weight, at zero."""
        # Never cast down: under a mixed policy the float32 weight is used as it is.
        self.weight = self.add_weight(name="weight", shape=(input_shape[-1],), initializer="zeros", autocast=False)

    def call(self, x):
        """(…, D) -> (…, D)."""
        return rms_norm(x, self.weight, self.epsilon)

    def compute_output_shape(self, input_shape):
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict:
        """Constructor arguments."""
        return {**super().get_config(), "epsilon": self.epsilon}
