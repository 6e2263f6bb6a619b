"""The product with a weight that is kept as checkpoints keep it."""

from keras import ops


def linear(x, weight):
    """`x W^T`.

    Args:
        x: (…, in) float tensor.
        weight: (out, in) tensor of the same dtype.

    Returns:
        (…, out) tensor of the dtype of `x`.
    """
    return ops.matmul(x, ops.transpose(weight))
