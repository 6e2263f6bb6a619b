from __future__ import annotations

import json
import os
import re
import struct

import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer
from gemma2_keras.errors import CheckpointError, PresetError
from tests.preprocessing import tiny

pytestmark = pytest.mark.once
EMBEDDING = "model.embed_tokens.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture
def refused(folder, monkeypatch):
    """Asserts that loading fails with a message, before a layer is built."""

    def check(message: str, **kwargs) -> None:
        def build(self, *args, **kwargs):
            raise AssertionError("A model was built from a broken checkpoint.")

        with monkeypatch.context() as patch:
            patch.setattr(Gemma2Backbone, "__init__", build)
            with pytest.raises(CheckpointError, match=message):
                Gemma2CausalLM.from_preset(folder, **kwargs)

    return check


# Files of weights


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, 0.5, 0.999, -1])
def test_a_truncated_file(folder, refused, length):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    refused(r"model.safetensors is truncated or broken \(.+\). Copy or download")


@pytest.mark.parametrize(
    "content",
    [
        np.random.default_rng(0).bytes(5000),
        b"\0" * 5000,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10_000) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{x",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    ],
    ids=["random", "zeros", "huge header", "long header", "header of a list", "no json", "git lfs"],
)
def test_a_file_that_is_no_safetensors(folder, refused, content):
    (folder / "model.safetensors").write_bytes(content)
    refused("model.safetensors is truncated or broken")


def write_header(path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    "offsets",
    [[[0, 96], [0, 96]], [[0, 96], [48, 144]], [[0, 96], [200, 296]], [[96, 0], [96, 192]], [[0, 96], [96, 180]]],
)
def test_offsets_that_overlap_or_leave_holes(folder, refused, offsets):
    header = {
        name: {"dtype": "F32", "shape": [24], "data_offsets": place}
        for name, place in zip([NORM, EMBEDDING], offsets, strict=True)
    }
    write_header(folder / "model.safetensors", header, b"\0" * 192)
    refused("model.safetensors is truncated or broken")


@pytest.fixture
def rewrite(folder):
    """Changes tensors of the file; `...` removes one."""

    def apply(**changes):
        tensors = {**load_file(folder / "model.safetensors"), **changes}
        tensors = {name: value for name, value in tensors.items() if value is not ...}
        save_file(tensors, folder / "model.safetensors")

    return apply


@pytest.mark.parametrize("dtype", ["float64", "int8", "int32", "bool", ml_dtypes.float8_e4m3fn, "uint16"])
def test_a_dtype_that_is_not_taken(folder, rewrite, refused, dtype):
    rewrite(**{NORM: np.ones(24, dtype)})
    refused(rf"'{re.escape(NORM)}' has dtype \w+; allowed: F32, BF16, F16")


@pytest.mark.parametrize("name", [EMBEDDING, NORM, Q_PROJ, "model.layers.0.mlp.up_proj.weight"])
def test_a_missing_tensor(rewrite, refused, name):
    rewrite(**{name: ...})
    refused(rf"lacks 1 tensors: '{re.escape(name)}'\.")


def test_many_missing_tensors_are_counted(folder, refused):
    save_file({NORM: np.ones(24, "float32"), EMBEDDING: np.ones((560, 24), "float32")}, folder / "model.safetensors")
    refused(r"lacks 22 tensors: .+, .+, .+ and 19 more")


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "x"])
def test_an_extra_tensor(rewrite, refused, name):
    rewrite(**{name: np.ones(3, "float32")})
    refused(rf"has 1 tensors that no Gemma 2 has: '{re.escape(name)}'")


def test_a_misshapen_tensor(rewrite, refused):
    # 4 heads of 8: as many numbers the other way round.
    rewrite(**{Q_PROJ: np.ones((24, 32), "float32")})
    refused(rf"'{re.escape(Q_PROJ)}' has shape \(24, 32\); the configuration asks \(32, 24\)")
    rewrite(**{Q_PROJ: np.ones((32, 24, 1), "float32")})
    refused(r"has shape \(32, 24, 1\)")
    rewrite(**{Q_PROJ: np.array(1, "float32")})
    refused(r"has shape \(\)")


def test_no_weights_at_all(folder, refused):
    (folder / "model.safetensors").unlink()
    refused(r"has neither model.safetensors nor model.safetensors.index.json")


def test_a_folder_in_the_place_of_the_file(folder, refused):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused("model.safetensors is truncated or broken")


# Shards


@pytest.fixture
def shards(folder):
    """The checkpoint in two files, and a way to change their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {"metadata": {}, "weight_map": {}}
    for i, part in enumerate((names[:10], names[10:]), start=1):
        save_file({name: tensors[name] for name in part}, folder / f"model-{i:05d}-of-00002.safetensors")
        index["weight_map"].update({name: f"model-{i:05d}-of-00002.safetensors" for name in part})

    def change(edit=lambda value: None):
        edit(index["weight_map"])
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    change()
    return change


def test_whole_shards_load(folder, shards, saved):
    expected = Gemma2Backbone.from_preset(saved)
    for a, b in zip(Gemma2Backbone.from_preset(folder).weights, expected.weights, strict=True):
        np.testing.assert_array_equal(a.numpy() if hasattr(a, "numpy") else a, b)


def test_a_missing_shard(folder, shards, refused):
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused("lacks the file model-00002-of-00002.safetensors")


def test_a_truncated_shard(folder, shards, refused):
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused("model-00002-of-00002.safetensors is truncated or broken")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", None, 5, ["a"]]
)
def test_an_index_that_names_no_plain_file(shards, refused, name):
    shards(lambda names: names.update({NORM: name}))
    refused("no plain file name")


def test_a_tensor_in_another_shard_than_the_index_says(shards, refused):
    shards(lambda names: names.update({Q_PROJ: "model-00001-of-00002.safetensors"}))
    refused(rf"does not hold what the index says: '{re.escape(Q_PROJ)}' in one of them only")


def test_a_tensor_that_the_index_leaves_out(shards, refused):
    shards(lambda names: names.pop(Q_PROJ))
    refused("does not hold what the index says")


def test_a_tensor_that_only_the_index_has(shards, refused):
    shards(lambda names: names.update({"x": "model-00001-of-00002.safetensors"}))
    refused("does not hold what the index says: 'x'")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": "x"}'])
def test_an_index_without_names(folder, shards, refused, content):
    (folder / "model.safetensors.index.json").write_text(content)
    refused("has no `weight_map`")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": {"a": "b", "a": "b"}}'])
def test_an_index_that_is_no_json_object(folder, shards, refused, content):
    (folder / "model.safetensors.index.json").write_text(content)
    refused("model.safetensors.index.json (cannot be read as JSON|holds a list)")


# Configurations

REQUIRED = [
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "sliding_window",
    "rms_norm_eps",
    "max_position_embeddings",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_required_key_is_missing(change, refused, key):
    change(**{key: ...})
    refused(f"The configuration lacks `{key}`")


@pytest.mark.parametrize("model_type", ["gemma", "llama", "gemma3_text", "Gemma2", "", None, ["gemma2"], ...])
def test_another_kind_of_model(change, refused, model_type):
    change(model_type=model_type)
    refused('`model_type` is .*; only "gemma2" is read')


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "`rope_scaling` is .* not implemented"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}, "`rope_parameters` is"),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0}, "`rope_parameters` is"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1.0, "factor": 2.0}, "`rope_parameters` is"),
        ("rope_parameters", {"rope_theta": 10000.0}, "`rope_parameters` is"),
        ("rope_parameters", [1], "`rope_parameters` is"),
        ("rope_theta", 500_000.0, "`rope_theta` is 500000.0 and 10000.0"),
        ("attention_bias", True, "`attention_bias` is True"),
        ("attention_dropout", 0.1, "`attention_dropout` is 0.1"),
        ("hidden_activation", "silu", "`hidden_activation` is 'silu', which is not implemented; allowed: 'gelu_py"),
        ("hidden_act", "relu", "`hidden_act` is 'relu'"),
        ("tie_word_embeddings", False, "`tie_word_embeddings` is False"),
        ("tie_word_embeddings", None, "`tie_word_embeddings` is None"),
        ("use_bidirectional_attention", True, "`use_bidirectional_attention` is True"),
        ("layer_types", ["full_attention", "sliding_attention"], "`layer_types` must alternate"),
        ("layer_types", ["sliding_attention"], "`layer_types` must alternate"),
        ("layer_types", ["sliding_attention", "full_attention"] * 2, "`layer_types` must alternate"),
        ("layer_types", "sliding_attention", "`layer_types` must alternate"),
        ("quantization_config", {"bits": 4}, "`quantization_config` is"),
        ("pruned_heads", {"0": [1]}, "`pruned_heads` is"),
        ("is_encoder_decoder", True, "`is_encoder_decoder` is True"),
        ("add_cross_attention", True, "`add_cross_attention` is True"),
        ("moe_experts", 8, "has 'moe_experts', unknown here: it could change what the model computes"),
        ("dtype", "float64", "`dtype` is 'float64'; allowed: float32, bfloat16, float16"),
        ("dtype", "int8", "`dtype` is 'int8'"),
        ("dtype", 5, "`dtype` is 5"),
        ("dtype", ["float32"], "`dtype` is"),
    ],
)
def test_what_would_change_the_mathematics(change, refused, key, value, message):
    change(**{key: value})
    refused(message)


# For each of our names, sizes that no model has.
NO_SIZES = [0, -1, "560", None, True, 1.5, [8], {}]


@pytest.mark.parametrize("value", NO_SIZES)
@pytest.mark.parametrize(
    "key", ["vocab_size", "num_hidden_layers", "num_attention_heads", "head_dim", "sliding_window"]
)
def test_a_size_that_is_none(change, refused, key, value):
    change(**{key: value})
    refused(r"describes no Gemma 2 model: `\w+` must be")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("query_pre_attn_scalar", "rms_norm_eps") for value in (0, -1, "1", True, [1])),
        *((key, value) for key in ("attn_logit_softcapping", "final_logit_softcapping") for value in (0, -5.0, "50")),
        ("head_dim", 7),
        ("num_key_value_heads", 3),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "10000"}),
    ],
)
def test_a_number_that_is_none(change, refused, key, value):
    change(**{key: value})
    refused("describes no Gemma 2 model: `")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_a_number_that_is_not_finite(folder, refused, value):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', f'"rms_norm_eps": {value}'))
    refused("is no finite number")


@pytest.mark.parametrize("number", [10**6, 10**12, 10**300])
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("vocab_size", f"'{re.escape(EMBEDDING)}' has shape"),
        ("num_hidden_layers", "too few for the 10+ layers"),
        ("hidden_size", "has shape"),
        ("intermediate_size", "has shape"),
        ("head_dim", "has shape"),
    ],
)
def test_a_size_beyond_all_memory_is_found_before_anything_is_allocated(change, refused, key, message, number):
    change(**{key: number, "layer_types": ...})
    refused(f"{message}|describes no Gemma 2 model: `[a-z_]+` must be at most")


@pytest.mark.parametrize("load_weights", [False, True])
def test_more_layers_than_any_list_holds(change, refused, load_weights):
    change(num_hidden_layers=10**12)
    refused("`num_layers` must be at most 10000; given 1000000000000", load_weights=load_weights)
    change(num_hidden_layers=9999)
    refused("`layer_types` must alternate", load_weights=load_weights)


@pytest.mark.parametrize("key", ["quantization_config", "model_type", "rope_parameters", "unknown" * 1000])
def test_a_message_does_not_repeat_what_a_file_has_without_end(change, folder, key):
    change(**{key: "q" * 10**5})
    with pytest.raises(CheckpointError) as caught:
        Gemma2CausalLM.from_preset(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "gemma2_keras.json", "tokenizer.model"])
def test_a_link_to_itself(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    with pytest.raises((CheckpointError, PresetError), match=name):
        Gemma2CausalLM.from_preset(folder)


@pytest.mark.parametrize("kind", ["folder", "huge"])
def test_a_vocabulary_that_is_none_is_not_passed_over(folder, kind):
    path = folder / "tokenizer.model"
    if kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        os.truncate(path, 2**30)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model cannot be read as a SentencePiece model"):
        Gemma2CausalLM.from_preset(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"gemma2"', '{"model_type": "gemma2", "model_type": "gemma2"}']
)
def test_a_configuration_that_is_no_json_object(folder, refused, content):
    (folder / "config.json").write_text(content)
    refused("config.json (cannot be read as JSON|holds a)")


# The configuration file of google/gemma-2-2b, as published in July 2024, but for its sizes.
PUBLISHED = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "max_position_embeddings": 96,
    "model_type": "gemma2",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 10,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 6,
    "torch_dtype": "float32",
    "transformers_version": "4.42.4",
    "use_cache": True,
}
SIZES = {
    "vocab_size": 560,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "head_dim": 8,
}


def test_the_configuration_of_the_published_model_is_read(folder, saved):
    # It says nothing of `tie_word_embeddings`: true is the default of transformers.
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **SIZES}))
    backbone = Gemma2Backbone.from_preset(folder)
    assert backbone.config == Gemma2Backbone.from_preset(saved).config
    assert backbone.dtype_policy.name == "float32"


def test_the_configuration_that_transformers_writes_is_read(folder):
    config = transformers.Gemma2Config(
        **SIZES, query_pre_attn_scalar=10, sliding_window=6, max_position_embeddings=96, dtype="float32"
    )
    config.save_pretrained(folder)
    assert Gemma2Backbone.from_preset(folder).config == tiny.backbone(num_layers=2).config
    # Whole, with every default that it knows.
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    assert Gemma2Backbone.from_preset(folder).config == tiny.backbone(num_layers=2).config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cache_implementation", "hybrid"),
        ("hidden_act", "gelu_pytorch_tanh"),
        ("hidden_activation", None),
        ("torch_dtype", "float32"),
        ("rope_theta", 10000.0),
        ("rope_scaling", None),
        ("rope_parameters", ...),
        ("use_bidirectional_attention", None),
        ("use_bidirectional_attention", False),
        ("layer_types", ...),
        ("attention_bias", None),
        ("quantization_config", None),
        ("pruned_heads", {}),
        ("tie_word_embeddings", ...),
        ("dtype", None),
        ("_name_or_path", "google/gemma-2-2b"),
        ("id2label", {"0": "LABEL_0"}),
        ("return_dict", True),
        ("initializer_range", 0.5),
        ("eos_token_id", [1, 107]),
    ],
)
def test_a_key_that_changes_nothing_is_read(folder, change, saved, key, value):
    change(**{key: value})
    assert Gemma2Backbone.from_preset(folder).config == Gemma2Backbone.from_preset(saved).config


def test_no_soft_caps_are_a_model_too(folder, change):
    change(attn_logit_softcapping=None, final_logit_softcapping=None)
    config = Gemma2Backbone.from_preset(folder).config
    assert (config.attention_logit_soft_cap, config.final_logit_soft_cap) == (None, None)


# The other files of a preset


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "holds a list"),
        ("{}", "has format None; this version reads 1"),
        ('{"format": 2}', "has format 2; this version reads 1"),
        ('{"format": 1, "adapters": {}}', r"unknown keys: 'adapters'"),
        ('{"format": 1, "tokenizer": {"proto": "/etc/passwd"}}', r"`tokenizer` in .* keys among \['parse_special'\]"),
        ('{"format": 1, "preprocessor": []}', "`preprocessor` in .* must be an object"),
        ('{"format": 1, "dropout": 1.5}', "`dropout` in .*gemma2_keras.json must be at least 0"),
        ('{"format": 1, "dropout": "x"}', "`dropout` in .*gemma2_keras.json must be at least 0"),
        (
            '{"format": 1, "preprocessor": {"sequence_length": "x"}}',
            "`sequence_length` in .*gemma2_keras.json must be of type int",
        ),
    ],
)
def test_a_bad_file_of_our_own(folder, content, message):
    (folder / "gemma2_keras.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Gemma2CausalLM.from_preset(folder)


@pytest.mark.parametrize("content", [b"", b"nonsense", tiny.proto()[:500]])
@pytest.mark.parametrize("cls", [Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer])
def test_a_bad_vocabulary(folder, cls, content):
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"has no Gemma tokenizer"):
        cls.from_preset(folder)


def test_a_missing_vocabulary(folder):
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").unlink()
    for cls in (Gemma2CausalLMPreprocessor, Gemma2Tokenizer):
        with pytest.raises(CheckpointError, match=r"has no tokenizer: neither tokenizer.model"):
            cls.from_preset(folder)
    assert Gemma2CausalLM.from_preset(folder).preprocessor is None
