from __future__ import annotations

import dataclasses

import pytest
import transformers

from gemma2_keras import describe_preset, list_presets
from gemma2_keras.errors import PresetError

pytestmark = pytest.mark.once

# Weights of the published models, the tied embedding counted once (https://huggingface.co/google).
PUBLISHED = {"2b": 2_614_341_888, "9b": 9_241_705_984, "27b": 27_227_128_320}


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("kind", ["", "instruct_"])
def test_published_models_have_their_published_size(size, kind):
    preset = describe_preset(f"gemma2_{kind}{size}_en")
    assert preset.parameters == PUBLISHED[size]
    assert preset.needs_download
    assert preset.hugging_face == f"google/gemma-2-{size}{'-it' if kind else ''}"


def test_the_2b_architecture_is_the_default_of_transformers_but_for_the_layers():
    # The defaults of `transformers.Gemma2Config` are those of the 2B model.
    theirs, ours = transformers.Gemma2Config(), describe_preset("gemma2_2b_en").architecture
    assert ours.vocabulary_size == theirs.vocab_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert (ours.hidden_dim, ours.intermediate_dim, ours.head_dim) == (2304, 9216, theirs.head_dim)
    assert (ours.hidden_dim, ours.intermediate_dim) == (theirs.hidden_size, theirs.intermediate_size)
    assert (ours.num_query_heads, ours.num_key_value_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert ours.query_pre_attention_scalar == theirs.query_pre_attn_scalar
    assert ours.attention_logit_soft_cap == theirs.attn_logit_softcapping
    assert ours.final_logit_soft_cap == theirs.final_logit_softcapping
    assert (ours.sliding_window_size, ours.context_length) == (theirs.sliding_window, theirs.max_position_embeddings)
    assert ours.layer_norm_epsilon == theirs.rms_norm_eps
    assert ours.rope_max_wavelength == theirs.rope_parameters["rope_theta"]


def test_presets_come_smallest_first_and_each_says_what_it_is():
    presets = [describe_preset(name) for name in list_presets()]
    assert len({preset.name for preset in presets}) == len(presets) >= 6
    assert [p.parameters for p in presets] == sorted(p.parameters for p in presets)
    for preset in presets:
        assert preset.parameters == preset.architecture.parameter_count
        assert preset.description
        assert preset.license
        assert (preset.folder is None) == preset.needs_download
        assert preset.hugging_face if preset.needs_download else preset.folder.is_dir()


def test_the_list_is_the_callers_own():
    list_presets().clear()
    assert list_presets()


def test_a_description_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        describe_preset("gemma2_2b_en").name = "mine"


@pytest.mark.parametrize(
    ("name", "near"),
    [("gemma2_2b", "gemma2_2b_en"), ("gemma2_instruct_9b", "gemma2_instruct_9b_en"), ("gemma-2-27b", "gemma2_27b_en")],
)
def test_an_unknown_name_brings_the_nearest(name, near):
    with pytest.raises(PresetError, match=rf"no preset '{name}'. Did you mean .*{near}"):
        describe_preset(name)


def test_a_name_like_none_says_so():
    with pytest.raises(PresetError, match=r"No name is like it.*list_presets"):
        describe_preset("zzzz")
