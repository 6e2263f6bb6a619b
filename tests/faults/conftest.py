from __future__ import annotations

import json

import pytest

from gemma2_keras import Gemma2CausalLM
from tests.preprocessing import tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A whole preset folder of a model of two layers; not to be changed."""
    folder = tmp_path_factory.mktemp("faults") / "saved"
    tiny.causal_lm(num_layers=2).save_to_preset(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """The same, to break."""
    copy = tmp_path / "checkpoint"
    copy.mkdir()
    for path in saved.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def change(folder):
    """Changes keys of the configuration; `...` removes one."""

    def apply(**changes):
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))

    return apply


@pytest.fixture(scope="session")
def model() -> Gemma2CausalLM:
    return tiny.causal_lm(num_layers=2)
