"""Exported folders in transformers itself: the same logits, the same greedy tokens, from text alone."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
import transformers
from keras import ops

from gemma2_keras import Gemma2CausalLM
from tests.preprocessing import tiny

TEXT = "The cat sat on the mat, and"


def randomized(dtype: str = "float32") -> Gemma2CausalLM:
    model = tiny.causal_lm(attention_logit_soft_cap=20.0, final_logit_soft_cap=10.0, dtype=dtype)
    random = np.random.default_rng(0)
    for weight in model.backbone.weights:
        weight.assign(0.3 * random.normal(size=weight.shape))
    return model


def our_logits(model, ids) -> np.ndarray:
    tokens = np.array([ids], "int32")
    logits = model({"token_ids": tokens, "padding_mask": np.ones_like(tokens)})
    return ops.convert_to_numpy(ops.stop_gradient(logits))


def their_logits(model, ids) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.float().numpy()


def opened(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("shard", [10, 2e-5])
def test_logits_and_ids_are_equal(tmp_path, shard):
    ours = randomized()
    ours.export_to_transformers(tmp_path / "out", max_shard_size=shard)
    theirs, tokenizer = opened(tmp_path / "out")
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == [2, *ours.preprocessor.tokenizer.encode(TEXT)]
    expected = their_logits(theirs, ids)
    assert np.abs(expected).max() > 2
    np.testing.assert_allclose(our_logits(ours, ids), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_beside_is_loaded_by_peft(tmp_path):
    ours = randomized()
    ours.enable_lora(2, alpha=3, targets="all-linear")
    for layer in ours.backbone.linear_layers().values():
        layer.lora_b.assign(0.3 * np.random.default_rng(1).normal(size=layer.lora_b.shape))
    ours.export_to_transformers(tmp_path / "out", merge_adapter=False)
    # As such, transformers puts the adapter onto the model by itself only if it lies in the folder, not below it.
    theirs, tokenizer = opened(tmp_path / "out")
    ids = tokenizer(TEXT)["input_ids"]
    without = their_logits(theirs, ids)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "out" / "adapter")
    expected = their_logits(adapted, ids)
    assert np.abs(expected - without).max() > 0.1
    np.testing.assert_allclose(our_logits(ours, ids), expected, rtol=1e-4, atol=1e-4)


def test_the_shipped_preset_generates_the_same_text_there(tmp_path):
    ours = Gemma2CausalLM.from_preset("gemma2_tiny_en")
    ours.export_to_transformers(tmp_path / "out")
    theirs, tokenizer = opened(tmp_path / "out")
    # Ends at <end_of_turn>, too.
    assert theirs.generation_config.eos_token_id == [1, 107]
    prompt = tokenizer("The old captain", return_tensors="pt")
    made = theirs.generate(**prompt, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(made[0], skip_special_tokens=True)
    assert ours.generate("The old captain", max_new_tokens=24) == text
