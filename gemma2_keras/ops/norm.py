"""Root-mean-square normalisation."""

from keras import ops


def rms_norm(x, weight, epsilon):
    """Scale `x` to unit mean square, then by `1 + weight`, in float32 throughout.

    Args:
        x: (…, D) float tensor.
        weight: (D,) float tensor; zeros leave the normalised `x` as it is.
        epsilon: added to the mean square.

    Returns:
        (…, D) tensor of the dtype of `x`.

    Source: RMSNorm (https://arxiv.org/abs/1910.07467); multiplied before the cast down, as the reference does.

    Example:

    >>> import numpy as np
    >>> np.asarray(rms_norm(np.array([[3.0, 4.0]], "float32"), np.zeros(2, "float32"), 0.0)).round(3)
    array([[0.849, 1.131]], dtype=float32)
    """
    dtype = x.dtype
    x = ops.cast(x, "float32")
    x = x * ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + epsilon)
    return ops.cast(x * (1.0 + ops.cast(weight, "float32")), dtype)
