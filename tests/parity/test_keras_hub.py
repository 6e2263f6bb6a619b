from __future__ import annotations

import functools

import keras
import keras_hub
import numpy as np
import pytest
import torch
from keras import ops

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM
from gemma2_keras.checkpoints.contents import LiveCheckpoint
from gemma2_keras.checkpoints.keras_hub.weights import KerasHubCheckpoint
from gemma2_keras.checkpoints.keras_hub.writing import write_keras_hub
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.layers.initialization import awaiting_weights

LENGTH = 19  # more than three windows of 5
THEIRS = {
    "vocabulary_size": 97,
    "num_layers": 3,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 48,
    "intermediate_dim": 80,
    "head_dim": 16,
    "sliding_window_size": 5,
    "attention_logit_soft_cap": 30.0,
    "final_logit_soft_cap": 8.0,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
}
CONFIGS = {
    "base": {},
    "as many key heads as heads": {"num_key_value_heads": 4},
    "one key head, no caps": {
        "num_key_value_heads": 1,
        "attention_logit_soft_cap": None,
        "final_logit_soft_cap": None,
    },
    # As in 27B: scaled by width / heads, 12, and not by the head size.
    "by width": {"query_head_dim_normalize": False},
    # KerasHub uses it in the last norm alone.
    "another epsilon": {"layer_norm_epsilon": 1.0},
}
WHERE_KERASHUB_IS_WRONG = {"by width": {"query_pre_attn_scalar": 12}, "another epsilon": {"rms_norm_eps": 1.0}}
WHERE_KERASHUB_IS_RIGHT = [name for name in CONFIGS if name not in WHERE_KERASHUB_IS_WRONG]
# KerasHub counts positions from the first token, padded or not.
PADDING_MASK = np.array([[1] * 19, [1] * 12 + [0] * 7, [1] + [0] * 18])
REAL = PADDING_MASK == 1


@pytest.fixture(autouse=True)
def _from_zeros(monkeypatch):
    """KerasHub's models start from zeros: JAX compiles a random initializer for each shape."""
    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", lambda _, shape, dtype: ops.zeros(shape, dtype))


@functools.cache
def make(name):
    """A model of KerasHub's with normal weights, large enough for both caps to count."""
    backbone = keras_hub.models.GemmaBackbone(**{**THEIRS, **CONFIGS[name]}, dtype="float32")
    random = np.random.default_rng(0)
    # As in reference.py; vectors are the weights of norms.
    values = (random.normal(0, 0.3 if len(weight.shape) == 1 else 0.5, weight.shape) for weight in backbone.weights)
    backbone.set_weights([value.astype("float32") for value in values])
    return keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)


def load(folder) -> Gemma2CausalLM:
    checkpoint = KerasHubCheckpoint(folder)
    with awaiting_weights():
        backbone = Gemma2Backbone(**checkpoint.config.to_dict())
    for name, weight in weight_map(checkpoint.config).items():
        weight.variable_of(backbone).assign(checkpoint.read(name))
    return Gemma2CausalLM(backbone)


@pytest.mark.parametrize("name", WHERE_KERASHUB_IS_RIGHT)
def test_logits_are_those_of_kerashub(name, reference, logits_of, tmp_path):
    make(name).save_to_preset(tmp_path)
    ids = reference.ids(len(PADDING_MASK), LENGTH)
    expected, found = (logits_of(model, ids, PADDING_MASK) for model in (make(name), load(tmp_path)))
    assert np.abs(found - expected)[REAL].max() <= 1e-4
    assert np.abs(expected).max() > 0.9 * THEIRS["final_logit_soft_cap"]


@pytest.mark.parametrize("change", [{"attention_logit_soft_cap": None}, {"sliding_window_size": 6}], ids=str)
def test_parity_would_fail_if_the_configuration_were_misread(change, reference, logits_of, tmp_path):
    make("base").save_to_preset(tmp_path)
    model = load(tmp_path)
    wrong = Gemma2Backbone(**{**model.backbone.config.to_dict(), **change})
    wrong.set_weights(model.backbone.get_weights())
    ids = reference.ids(len(PADDING_MASK), LENGTH)
    expected, found = (logits_of(model, ids, PADDING_MASK) for model in (make("base"), Gemma2CausalLM(wrong)))
    assert np.abs(found - expected)[REAL].max() > 1e-2


@pytest.mark.parametrize("name", WHERE_KERASHUB_IS_WRONG)
def test_where_kerashub_is_wrong_our_logits_are_those_of_transformers(name, reference, logits_of, tmp_path):
    theirs = make(name)
    theirs.save_to_preset(tmp_path)
    judge = reference.make({"query_pre_attn_scalar": 16, **WHERE_KERASHUB_IS_WRONG[name]})
    checkpoint = KerasHubCheckpoint(tmp_path)
    tensors = {name: torch.tensor(np.array(checkpoint.read(name))) for name in weight_map(checkpoint.config)}
    judge.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    ids = reference.ids(len(PADDING_MASK), LENGTH)
    expected = reference.logits(judge, ids, PADDING_MASK)
    assert np.abs(logits_of(load(tmp_path), ids, PADDING_MASK) - expected)[REAL].max() <= 1e-4
    assert np.abs(logits_of(theirs, ids, PADDING_MASK) - expected)[REAL].max() > 1e-2


def test_kerashub_computes_our_logits_from_what_we_write(reference, logits_of, tmp_path):
    config = {**THEIRS, "intermediate_dim": 40}
    backbone = Gemma2Backbone(**{key: value for key, value in config.items() if not key.startswith("use_")})
    random = np.random.default_rng(1)
    for weight in backbone.weights:
        weight.assign(random.normal(0, 0.3 if len(weight.shape) == 1 else 0.5, weight.shape))
    # Into several files; single ones are tested beside the code.
    write_keras_hub(tmp_path, LiveCheckpoint(backbone), max_shard_size=40e-6)
    assert len(list(tmp_path.glob("*.h5"))) > 1
    theirs = keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path), dtype="float32")
    ids = reference.ids(len(PADDING_MASK), LENGTH)
    expected, found = (logits_of(model, ids, PADDING_MASK) for model in (theirs, Gemma2CausalLM(backbone)))
    assert np.abs(found - expected)[REAL].max() <= 1e-4
