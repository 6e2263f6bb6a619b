from __future__ import annotations

import importlib.util
import pathlib

import keras
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

    def call(model, token_ids, padding_mask=None):
        mask = keras.ops.ones_like(token_ids) if padding_mask is None else padding_mask
        return keras.ops.convert_to_numpy(model({"token_ids": token_ids, "padding_mask": mask}))

    return call
