"""Rotary position embedding in the split-half layout."""

import numpy as np
from keras import ops


def rotary_tables(positions, head_dim, max_wavelength):
    """Cosines and sines that turn the halves of a head by its position.

    Args:
        positions: (B, T) int tensor; a negative position, which marks padding, counts as 0.
        head_dim: size H of a head, even.
        max_wavelength: base of the wavelengths.

    Returns:
        Two (B, T, 1, H/2) float32 tensors, cosine and sine; the axis of 1 broadcasts over heads.

    Source: RoFormer (https://arxiv.org/abs/2104.09864).
    """
    # The frequencies are constants: taken in float64 and rounded once.
    frequencies = float(max_wavelength) ** (-np.arange(0, head_dim, 2) / head_dim)
    frequencies = ops.convert_to_tensor(frequencies.astype("float32"))
    angles = ops.cast(ops.maximum(positions, 0), "float32")[:, :, None, None] * frequencies
    return ops.cos(angles), ops.sin(angles)


def apply_rotary(x, cosine, sine):
    """Turn each pair (x[i], x[i + H/2]) by its angle, in float32.

    Args:
        x: (B, T, heads, H) float tensor.
        cosine: (B, T, 1, H/2) float32 tensor, from `rotary_tables`.
        sine: the same for the sine.

    Returns:
        (B, T, heads, H) tensor of the dtype of `x`.
    """
    first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
    turned = ops.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return ops.cast(turned, x.dtype)
