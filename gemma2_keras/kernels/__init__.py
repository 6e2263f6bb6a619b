"""The functions of `ops/`, fast: a kernel gives what its portable twin gives. One file per backend, chosen here."""

import keras

match keras.backend.backend():
    case "jax":
        from gemma2_keras.kernels.jax import *  # noqa: F403
    case "tensorflow":
        from gemma2_keras.kernels.tensorflow import *  # noqa: F403
    case "torch":
        from gemma2_keras.kernels.torch import *  # noqa: F403
    case backend:
        raise ImportError(f"gemma2_keras runs on the Keras backends jax, tensorflow and torch; this is {backend}.")
