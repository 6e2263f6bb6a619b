"""The gated activation of the feed-forward branch."""

from keras import ops


def gated_gelu(gate, up):
    """`gelu(gate) * up` with the tanh approximation of GELU.

    Args:
        gate: (…, F) float tensor.
        up: (…, F) float tensor.

    Returns:
        (…, F) tensor.

    Source: GLU variants (https://arxiv.org/abs/2002.05202), GEGLU.
    """
    return ops.gelu(gate, approximate=True) * up
