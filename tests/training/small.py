"""A model and data small enough for many runs."""

from __future__ import annotations

import keras
import numpy as np

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM, TokenDataset

VOCABULARY = 31


def model(lora: bool = True, dropout: float = 0.1, seed: int = 1, optimizer=None, eager=False) -> Gemma2CausalLM:
    """A compiled model; `eager` for few steps, where TensorFlow would take longer to trace them."""
    keras.utils.set_random_seed(seed)
    backbone = Gemma2Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=1,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=24,
        intermediate_dim=20,
        head_dim=8,
        sliding_window_size=3,
        dropout=dropout,
    )
    made = Gemma2CausalLM(backbone)
    if lora:
        made.enable_lora(2, dropout=dropout)
    compile_small(made, keras.optimizers.Adam(0.02) if optimizer is None else optimizer, eager)
    return made


def compile_small(model: Gemma2CausalLM, optimizer, eager: bool = False, **options) -> None:
    # XLA compiles longer than so small a model trains.
    is_jax = keras.backend.backend() == "jax"
    model.compile(optimizer, jit_compile=is_jax, run_eagerly=eager and not is_jax, **options)


def data(examples: int = 9, batch_size: int = 2, seed: int = 0, cls=TokenDataset, **options) -> TokenDataset:
    random = np.random.default_rng(seed)
    ids = random.integers(1, VOCABULARY, (examples, 8)).astype("int32")
    mask = np.arange(7) < random.integers(3, 8, (examples, 1))
    x = {"token_ids": ids[:, :-1] * mask, "padding_mask": mask.astype("int32")}
    return cls(x, ids[:, 1:], mask.astype("float32"), batch_size=batch_size, **options)
