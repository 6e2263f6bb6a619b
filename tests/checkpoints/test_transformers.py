from __future__ import annotations

import json

import keras
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from keras import ops
from safetensors.numpy import load_file, save_file

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.checkpoints.transformers import layer_types
from gemma2_keras.errors import CheckpointError
from tests.preprocessing import tiny

# One row with its padding on the left, which positions must not count.
TOKEN_IDS = np.random.default_rng(0).integers(3, 560, (2, 11)).astype("int32")
MASK = np.ones_like(TOKEN_IDS)
MASK[1, :3] = 0
# Keys of a configuration that say nothing about the mathematics.
SILENT = {"_name_or_path", "transformers_version", "architectures", "initializer_range"}


def their_logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKEN_IDS).long(), attention_mask=torch.tensor(MASK)).logits.float().numpy()


def our_logits(model) -> np.ndarray:
    return ops.convert_to_numpy(ops.stop_gradient(model({"token_ids": TOKEN_IDS, "padding_mask": MASK})))


def assert_same_logits(a: np.ndarray, b: np.ndarray) -> None:
    assert np.abs(b).max() > 1
    np.testing.assert_allclose(a[MASK == 1], b[MASK == 1], rtol=1e-4, atol=1e-4)


def reopened(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **kwargs).eval()


def assert_holds(backbone, tensors, dtype: str) -> None:
    for name, weight in weight_map(backbone.config).items():
        variable = weight.variable_of(backbone)
        assert keras.backend.standardize_dtype(variable.dtype) == dtype
        # float32 holds every value of the narrower types.
        expected = tensors[name].float().numpy()
        np.testing.assert_array_equal(ops.convert_to_numpy(variable).astype("float32"), expected, err_msg=name)


@pytest.mark.parametrize("shard", [None, "20KB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_weight_is_loaded_bit_for_bit(their_folder, tmp_path, dtype, shard):
    model = reopened(their_folder, dtype=dtype)
    model.save_pretrained(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard is not None)
    assert_holds(Gemma2Backbone.from_preset(tmp_path), model.state_dict(), dtype)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("bfloat16", "bfloat16"), ("float16", "float16"), ("mixed_bfloat16", "float32"), ("float32", "float32")],
)
def test_weights_are_rounded_to_the_dtype_asked_for(their_folder, their_model, dtype, stored):
    backbone = Gemma2Backbone.from_preset(str(their_folder), dtype=dtype)
    assert backbone.dtype_policy.name == dtype
    tensors = {name: tensor.to(getattr(torch, stored)) for name, tensor in their_model.state_dict().items()}
    assert_holds(backbone, tensors, stored)


def test_logits_are_those_of_transformers(their_folder, their_model):
    model = Gemma2CausalLM.from_preset(their_folder)
    assert model.preprocessor is None
    assert_same_logits(our_logits(model), their_logits(their_model))


def test_without_weights_the_architecture_is_the_same_and_the_numbers_are_random(their_folder, their_model):
    loaded = Gemma2Backbone.from_preset(their_folder)
    fresh = Gemma2Backbone.from_preset(their_folder, load_weights=False)
    assert fresh.config == loaded.config
    start = ops.convert_to_numpy(fresh.token_embedding.embeddings)
    assert 0.015 < start.std() < 0.025
    assert not np.array_equal(start, their_model.state_dict()["model.embed_tokens.weight"].numpy())


def test_what_we_save_transformers_loads(their_folder, their_model, tmp_path):
    model = Gemma2CausalLM.from_preset(their_folder)
    model.save_to_preset(tmp_path / "saved")
    again = reopened(tmp_path / "saved")
    assert_same_logits(their_logits(again), our_logits(model))
    for name, tensor in their_model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    ours, theirs = again.config.to_dict(), their_model.config.to_dict()
    assert {key: ours[key] for key in theirs.keys() - SILENT} == {key: theirs[key] for key in theirs.keys() - SILENT}
    assert ours["architectures"] == ["Gemma2ForCausalLM"]
    assert ours["dtype"] in (torch.float32, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_kept_on_saving(their_folder, tmp_path, dtype):
    Gemma2CausalLM.from_preset(their_folder, dtype=dtype).save_to_preset(tmp_path / "saved")
    again = reopened(tmp_path / "saved", dtype="auto")
    assert again.dtype == getattr(torch, dtype)
    assert_holds(Gemma2Backbone.from_preset(tmp_path / "saved"), again.state_dict(), dtype)


def test_weights_are_written_in_shards_no_larger_than_asked(their_folder, their_model, tmp_path):
    model = Gemma2CausalLM.from_preset(their_folder)
    model.save_to_preset(tmp_path / "saved", max_shard_size=20e-6)
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    held = {file: load_file(file) for file in files}
    for tensors in held.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in held.values() for t in tensors.values())
    assert_same_logits(their_logits(reopened(tmp_path / "saved")), their_logits(their_model))
    assert_holds(Gemma2Backbone.from_preset(tmp_path / "saved"), their_model.state_dict(), "float32")


@pytest.mark.once
@pytest.mark.parametrize("size", [0, -1.0, "1GB"])
def test_a_shard_size_that_is_none_is_refused(tmp_path, size):
    model = tiny.causal_lm(num_layers=1)
    with pytest.raises(ValueError, match="`max_shard_size` must be above 0 GB"):
        model.save_to_preset(tmp_path / "saved", max_shard_size=size)
    assert not (tmp_path / "saved").exists()


def test_a_single_file_after_shards_leaves_no_shards(tmp_path):
    model = tiny.causal_lm(num_layers=1)
    model.save_to_preset(tmp_path / "saved", max_shard_size=20e-6)
    model.save_to_preset(tmp_path / "saved", max_shard_size=None)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "gemma2_keras.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


def test_adapters_are_merged_on_saving(their_folder, tmp_path):
    model = Gemma2CausalLM.from_preset(their_folder)
    before = our_logits(model)
    model.enable_lora(2, targets=["q_proj", "o_proj", "down_proj"], alpha=3)
    random = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0, 0.3, variable.shape))
    adapted = our_logits(model)
    assert np.abs(adapted - before).max() > 0.1
    model.save_to_preset(tmp_path / "saved")
    assert_same_logits(our_logits(Gemma2CausalLM.from_preset(tmp_path / "saved")), adapted)
    assert_same_logits(their_logits(reopened(tmp_path / "saved")), adapted)


@pytest.mark.once
def test_a_copy_of_the_embedding_is_accepted_as_output_and_another_is_not(their_folder, their_model, tmp_path):
    (tmp_path / "config.json").write_text((their_folder / "config.json").read_text())
    tensors = load_file(their_folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding}, tmp_path / "model.safetensors")
    assert_holds(Gemma2Backbone.from_preset(tmp_path), their_model.state_dict(), "float32")
    other = embedding.copy()
    other[5, 5] += 1e-6
    for copy in (other, embedding[:-1], embedding.T.copy()):
        save_file({**tensors, "lm_head.weight": copy}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"lm_head.weight.* is not implemented"):
            Gemma2Backbone.from_preset(tmp_path)


@pytest.mark.once
def test_a_missing_dtype_is_read_off_the_tensors(their_folder, tmp_path):
    config = json.loads((their_folder / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(their_folder / "model.safetensors")
    save_file({n: t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()}, tmp_path / "model.safetensors")
    assert Gemma2Backbone.from_preset(tmp_path).dtype_policy.name == "bfloat16"
    narrow = {"model.norm.weight": tensors["model.norm.weight"].astype("float16")}
    save_file({**tensors, **narrow}, tmp_path / "model.safetensors")
    assert Gemma2Backbone.from_preset(tmp_path).dtype_policy.name == "float32"


def test_a_whole_task_returns_from_its_folder(tmp_path):
    model = tiny.causal_lm(num_layers=1, dropout=0.25)
    model.preprocessor.tokenizer.parse_special = True
    model.preprocessor.add_end_token = False
    model.save_to_preset(tmp_path / "saved")
    again = Gemma2CausalLM.from_preset(tmp_path / "saved")
    np.testing.assert_array_equal(our_logits(again), our_logits(model))
    assert again.backbone.config == model.backbone.config
    assert again.preprocessor.tokenizer.proto == tiny.proto()
    assert again.preprocessor.tokenizer.parse_special is True
    assert again.preprocessor.sequence_length == 16
    assert (again.preprocessor.add_start_token, again.preprocessor.add_end_token) == (True, False)
    generation = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 2, "eos_token_id": [1, 107], "pad_token_id": 0}
    without = Gemma2CausalLM.from_preset(tmp_path / "saved", preprocessor=None)
    assert without.preprocessor is None


@pytest.mark.once
def test_local_layers_come_first_and_in_turn():
    config = tiny.backbone(num_layers=5).config
    expected = transformers.Gemma2Config(num_hidden_layers=5).layer_types
    assert layer_types(config) == expected
