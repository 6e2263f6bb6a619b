from __future__ import annotations

import keras_hub
import numpy as np
import pytest
import torch
from keras import ops

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM
from gemma2_keras.checkpoints.contents import LiveCheckpoint
from gemma2_keras.checkpoints.keras_hub import KerasHubCheckpoint, write_keras_hub
from gemma2_keras.checkpoints.names import weight_map

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
    "one key head": {"num_key_value_heads": 1},
    "as many key heads as heads": {"num_query_heads": 3, "num_key_value_heads": 3, "hidden_dim": 33, "head_dim": 10},
    "no caps": {"attention_logit_soft_cap": None, "final_logit_soft_cap": None},
}
# As in 27B: scaled by width / heads, 18, and not by the head size.
BY_WIDTH = {"hidden_dim": 72, "head_dim": 8, "query_head_dim_normalize": False}
# KerasHub counts positions from the first token, padded or not.
PADDING_MASK = np.array([[1] * 19, [1] * 12 + [0] * 7, [1] + [0] * 18])


def make(changes):
    """A model of KerasHub's with normal weights, large enough for both caps to count."""
    backbone = keras_hub.models.GemmaBackbone(**{**THEIRS, **changes}, dtype="float32")
    random = np.random.default_rng(0)
    # As in reference.py; vectors are the weights of norms.
    values = (random.normal(0, 0.3 if len(weight.shape) == 1 else 0.5, weight.shape) for weight in backbone.weights)
    backbone.set_weights([value.astype("float32") for value in values])
    return keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)


def load(folder) -> Gemma2CausalLM:
    checkpoint = KerasHubCheckpoint(folder)
    backbone = Gemma2Backbone(**checkpoint.config.to_dict())
    for name, weight in weight_map(checkpoint.config).items():
        weight.variable_of(backbone).assign(checkpoint.read(name))
    return Gemma2CausalLM(backbone)


def their_logits(model, ids) -> np.ndarray:
    return ops.convert_to_numpy(ops.stop_gradient(model({"token_ids": ids, "padding_mask": PADDING_MASK})))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_kerashub(changes, reference, logits_of, tmp_path):
    theirs = make(changes)
    theirs.save_to_preset(tmp_path)
    ids = reference.ids(len(PADDING_MASK), LENGTH)
    expected, found = their_logits(theirs, ids), logits_of(load(tmp_path), ids, PADDING_MASK)
    assert np.abs(found - expected)[PADDING_MASK == 1].max() <= 1e-4
    if THEIRS["final_logit_soft_cap"] and "final_logit_soft_cap" not in changes:
        assert np.abs(expected).max() > 0.9 * THEIRS["final_logit_soft_cap"]


@pytest.mark.parametrize("change", [{"attention_logit_soft_cap": None}, {"sliding_window_size": 6}], ids=str)
def test_parity_would_fail_if_the_configuration_were_misread(change, reference, logits_of, tmp_path):
    theirs = make({})
    theirs.save_to_preset(tmp_path)
    model = load(tmp_path)
    wrong = Gemma2Backbone(**{**model.backbone.config.to_dict(), **change})
    wrong.set_weights(model.backbone.get_weights())
    ids = reference.ids(len(PADDING_MASK), LENGTH)
    found = logits_of(Gemma2CausalLM(wrong), ids, PADDING_MASK)
    assert np.abs(found - their_logits(theirs, ids))[PADDING_MASK == 1].max() > 1e-2


def test_scaled_by_width_our_logits_are_those_of_transformers_and_kerashubs_are_not(reference, logits_of, tmp_path):
    theirs = make(BY_WIDTH)
    theirs.save_to_preset(tmp_path)
    ours = load(tmp_path)
    judge = reference.make({"hidden_size": 72, "head_dim": 8, "query_pre_attn_scalar": 18})
    checkpoint = KerasHubCheckpoint(tmp_path)
    tensors = {name: torch.tensor(np.array(checkpoint.read(name))) for name in weight_map(checkpoint.config)}
    judge.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    ids = reference.ids(len(PADDING_MASK), LENGTH)
    expected, real = reference.logits(judge, ids, PADDING_MASK), PADDING_MASK == 1
    assert np.abs(logits_of(ours, ids, PADDING_MASK) - expected)[real].max() <= 1e-4
    assert np.abs(their_logits(theirs, ids) - expected)[real].max() > 1e-2


@pytest.mark.parametrize("shard", [None, 40e-6], ids=["single", "sharded"])
def test_kerashub_computes_our_logits_from_what_we_write(shard, reference, logits_of, tmp_path):
    config = {**THEIRS, "intermediate_dim": 40}
    backbone = Gemma2Backbone(**{key: value for key, value in config.items() if not key.startswith("use_")})
    random = np.random.default_rng(1)
    for weight in backbone.weights:
        weight.assign(random.normal(0, 0.3 if len(weight.shape) == 1 else 0.5, weight.shape))
    write_keras_hub(tmp_path, LiveCheckpoint(backbone), max_shard_size=shard)
    theirs = keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path), dtype="float32")
    ids = reference.ids(len(PADDING_MASK), LENGTH)
    found = logits_of(Gemma2CausalLM(backbone), ids, PADDING_MASK)
    assert np.abs(their_logits(theirs, ids) - found)[PADDING_MASK == 1].max() <= 1e-4
