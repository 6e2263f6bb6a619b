from __future__ import annotations

import json

import keras
import pytest

from gemma2_keras import Gemma2Backbone
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.checkpoints.transformers import parse_config


@pytest.mark.once
def test_names_and_shapes_are_those_of_transformers(their_model):
    state = {name: tuple(tensor.shape) for name, tensor in their_model.state_dict().items()}
    # Tied, so that it is no weight of its own and not in files.
    assert state.pop("lm_head.weight") == state["model.embed_tokens.weight"]
    config = parse_config(_config(their_model))
    assert {name: weight.shape for name, weight in weight_map(config).items()} == state


def _config(model):
    return json.loads(model.config.to_json_string())


@pytest.mark.once
def test_every_variable_has_one_name(their_model):
    config = parse_config(_config(their_model))
    backbone = Gemma2Backbone(**config.to_dict())
    named = [weight.variable_of(backbone) for weight in weight_map(config).values()]
    assert sorted(map(id, named)) == sorted(map(id, backbone.weights))
    for name, weight in weight_map(config).items():
        assert tuple(weight.variable_of(backbone).shape) == weight.shape, name
    assert sum(keras.ops.size(v) for v in backbone.weights) == config.parameter_count
