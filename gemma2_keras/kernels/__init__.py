"""The functions of `ops/`, fast: a kernel gives what its portable twin gives. One file per backend, chosen here."""

import keras

match keras.backend.backend():
    case "jax":
        from gemma2_keras.kernels.jax import (
            STATIC_SHAPES,
            attention,
            compiled,
            linear,
            projected_cross_entropy,
            stored,
            tensor,
            write_slots,
        )
    case "tensorflow":
        from gemma2_keras.kernels.tensorflow import (
            STATIC_SHAPES,
            attention,
            compiled,
            linear,
            projected_cross_entropy,
            stored,
            tensor,
            write_slots,
        )
    case "torch":
        from gemma2_keras.kernels.torch import (
            STATIC_SHAPES,
            attention,
            compiled,
            linear,
            projected_cross_entropy,
            stored,
            tensor,
            write_slots,
        )
    case backend:
        raise ImportError(f"gemma2_keras runs on the Keras backends jax, tensorflow and torch; this is {backend}.")

__all__ = [
    "STATIC_SHAPES",
    "attention",
    "compiled",
    "linear",
    "projected_cross_entropy",
    "stored",
    "tensor",
    "write_slots",
]
