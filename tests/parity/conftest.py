from __future__ import annotations

import importlib.util
import pathlib

import keras
import numpy as np
import pytest

from gemma2_keras import Gemma2CausalLM


def _load():
    spec = importlib.util.spec_from_file_location("parity_reference", pathlib.Path(__file__).with_name("reference.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference():
    """The functions of reference.py."""
    return _load()


@pytest.fixture(scope="session")
def ours(tmp_path_factory):
    """Our model out of the folder that transformers wrote for one of its models."""

    def load(theirs, dtype=None, **kwargs):
        folder = tmp_path_factory.mktemp("checkpoint")
        theirs.save_pretrained(folder)
        return Gemma2CausalLM.from_preset(str(folder), dtype=dtype, **kwargs)

    return load


@pytest.fixture(scope="session")
def logits_of():
    """(B, T, V) logits of our model as an array."""
    compiled = {}

    def call(model, token_ids, padding_mask=None):
        mask = np.ones_like(token_ids) if padding_mask is None else padding_mask
        inputs = {"token_ids": token_ids, "padding_mask": mask}
        if keras.backend.backend() != "jax":
            return keras.ops.convert_to_numpy(model(inputs))
        # Compiled whole, and with little effort, which is much quicker than one operation after the other.
        if model not in compiled:
            import jax

            compiled[model] = jax.jit(
                lambda *arguments: model.stateless_call(*arguments)[0],
                compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
            )
        values = ([v.value for v in weights] for weights in (model.trainable_variables, model.non_trainable_variables))
        return np.asarray(compiled[model](*values, inputs))

    return call
