from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re

import keras_hub
import pytest
import transformers

from gemma2_keras import (
    Gemma2Backbone,
    Gemma2CausalLM,
    Gemma2CausalLMPreprocessor,
    Gemma2Tokenizer,
    describe_preset,
    list_presets,
)
from gemma2_keras.errors import PresetError

pytestmark = pytest.mark.once

# Weights of the published models, the tied embedding counted once (https://huggingface.co/google).
PUBLISHED = {"2b": 2_614_341_888, "9b": 9_241_705_984, "27b": 27_227_128_320}
WITH_IMAGES = {
    ("3b", 224): 3_032_094_960,
    ("3b", 448): 3_032_979_696,
    ("3b", 896): 3_036_518_640,
    ("10b", 224): 9_662_409_456,
    ("10b", 448): 9_663_294_192,
    ("10b", 896): 9_666_833_136,
    ("28b", 224): 27_650_192_112,
    ("28b", 448): 27_651_076_848,
    ("28b", 896): 27_654_615_792,
}
PRESETS = [describe_preset(name) for name in list_presets()]
KERAS_HUB = {
    **keras_hub.models.GemmaBackbone.presets,
    **keras_hub.models.PaliGemmaBackbone.presets,
}


def computed(preset) -> int:
    vision, text = preset.vision, preset.architecture
    more = 0 if vision is None else vision.parameter_count + vision.projector_count(text.hidden_dim)
    return text.parameter_count + more


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize(("kind", "ending"), [("gemma2_", ""), ("gemma2_instruct_", "-it"), ("shieldgemma_", None)])
def test_published_models_have_their_published_size(size, kind, ending):
    preset = describe_preset(f"{kind}{size}_en")
    assert preset.parameters == computed(preset) == PUBLISHED[size]
    assert preset.hugging_face == (f"google/shieldgemma-{size}" if ending is None else f"google/gemma-2-{size}{ending}")
    assert preset.kind == ("classifier" if ending is None else "text")
    assert preset.stop_token_ids == ((1,) if ending == "" else (1, 107))
    assert preset.is_text_model
    preset.require_text_model()


@pytest.mark.parametrize(("size", "image"), WITH_IMAGES)
def test_models_with_images_have_their_published_size(size, image):
    for tuning in ("pt", "mix") if image < 896 else ("pt",):
        preset = describe_preset(f"pali_gemma2_{tuning}_{size}_{image}")
        assert preset.parameters == computed(preset) == WITH_IMAGES[size, image]
        assert preset.hugging_face == f"google/paligemma2-{size}-{tuning}-{image}"
        assert preset.vision.num_image_tokens == {224: 256, 448: 1024, 896: 4096}[image]
        assert (preset.kind, preset.stop_token_ids) == ("image-text", (1,))


def test_the_vision_tower_is_that_of_transformers():
    sizes = {
        "image_size": 28,
        "patch_size": 14,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_size": 24,
        "intermediate_size": 40,
    }
    theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, vision_use_head=False))
    ours = dataclasses.replace(
        describe_preset("pali_gemma2_pt_3b_224").vision,
        image_size=28,
        num_layers=3,
        num_heads=4,
        hidden_dim=24,
        intermediate_dim=40,
    )
    assert ours.parameter_count == sum(parameter.numel() for parameter in theirs.parameters())
    assert ours.projector_count(10) == 24 * 10 + 10


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_layers", 0, "`num_layers` must be a whole number"),
        ("image_size", 225, "`image_size` must be a multiple of `patch_size`; given 225"),
        ("num_heads", 7, "`hidden_dim` must be a multiple of `num_heads`"),
    ],
)
def test_a_vision_tower_that_cannot_be_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(describe_preset("pali_gemma2_pt_3b_224").vision, **{name: value})


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


def test_kaggles_handles_are_those_of_keras_hub():
    published = [preset for preset in PRESETS if preset.needs_download]
    assert len(published) == 24
    for preset in published:
        assert preset.kaggle == KERAS_HUB[preset.name]["kaggle_handle"]
        assert preset.dtype == "bfloat16"


def test_presets_come_smallest_first_and_each_says_what_it_is():
    assert len({preset.name for preset in PRESETS}) == len(PRESETS)
    assert [p.parameters for p in PRESETS] == sorted(p.parameters for p in PRESETS)
    for preset in PRESETS:
        assert preset.parameters == computed(preset) == sum(preset.parameter_parts.values())
        assert preset.description
        assert preset.license
        assert preset.dtype in ("float32", "bfloat16")
        assert (preset.vision is None) == preset.is_text_model
        assert (preset.folder is None) == preset.needs_download
        assert preset.hugging_face if preset.needs_download else preset.folder.is_dir()


def test_a_revision_is_a_commit_and_belongs_to_one_model():
    pinned = {preset.hugging_face: preset.hugging_face_revision for preset in PRESETS if preset.hugging_face_revision}
    assert all(re.fullmatch("[0-9a-f]{40}", revision) for revision in pinned.values())
    assert len(set(pinned.values())) == len(pinned) >= 6


def test_files_of_presets_have_the_same_keys_in_the_same_order():
    root = importlib.resources.files("gemma2_keras.presets")
    for preset in PRESETS:
        keys = list(json.loads((root / f"{preset.name}.json").read_text(encoding="utf-8")))
        assert keys == [
            "description",
            "kind",
            "license",
            "hugging_face",
            "hugging_face_revision",
            "kaggle",
            "dtype",
            "stop_token_ids",
            "parameters",
            "architecture",
            *["vision"] * (preset.vision is not None),
        ]


@pytest.mark.parametrize("cls", [Gemma2CausalLM, Gemma2Backbone, Gemma2Tokenizer, Gemma2CausalLMPreprocessor])
def test_each_class_knows_the_presets_that_it_loads(cls):
    assert list(cls.presets) == [preset.name for preset in PRESETS if preset.is_text_model]
    theirs = KERAS_HUB["gemma2_2b_en"]
    ours = cls.presets["gemma2_2b_en"]
    assert ours["kaggle_handle"] == theirs["kaggle_handle"]
    assert ours["metadata"]["params"] == theirs["metadata"]["params"]
    assert set(ours["metadata"]) <= set(theirs["metadata"])
    cls.presets.clear()
    assert cls.presets


@pytest.mark.parametrize("cls", [Gemma2CausalLM, Gemma2Backbone, Gemma2Tokenizer, Gemma2CausalLMPreprocessor])
def test_a_model_of_images_is_refused_before_it_is_fetched(cls, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("something was fetched"))
    with pytest.raises(PresetError, match=r"pali_gemma2_mix_10b_448 is a model of images and text.*gemma2_9b_en"):
        cls.from_preset("pali_gemma2_mix_10b_448")


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


@pytest.mark.parametrize("name", [None, 5, [], b"gemma2_2b_en"])
def test_what_is_no_name_is_told(name):
    with pytest.raises(PresetError, match=f"`name` must be the name of a preset; given {type(name).__name__}"):
        describe_preset(name)


def test_a_name_like_none_says_so():
    with pytest.raises(PresetError, match=r"No name is like it.*list_presets"):
        describe_preset("zzzz")
