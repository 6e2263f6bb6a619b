"""Parts of a preset saved one by one, as KerasHub's users do."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import transformers
from keras import ops

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer
from gemma2_keras.checkpoints import presets
from gemma2_keras.checkpoints.contents import WatchedCheckpoint
from gemma2_keras.checkpoints.own_file import own_settings
from gemma2_keras.errors import CheckpointError, PresetError
from tests.preprocessing import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.causal_lm(num_layers=1)


def test_parts_saved_into_one_folder_make_the_whole(model, tmp_path):
    model.backbone.save_to_preset(tmp_path / "preset")
    model.preprocessor.save_to_preset(tmp_path / "preset")
    again = Gemma2CausalLM.from_preset(tmp_path / "preset")
    assert again.preprocessor.sequence_length == model.preprocessor.sequence_length
    assert again.generate("The cat", max_new_tokens=5) == model.generate("The cat", max_new_tokens=5)
    for a, b in zip(again.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


@pytest.mark.once
def test_transformers_reads_the_tokenizer_with_what_stands_before_a_text(model, tmp_path):
    model.save_to_preset(tmp_path / "preset")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "preset")
    assert theirs("The cat")["input_ids"] == [2, *model.preprocessor.tokenizer.encode("The cat")]
    assert theirs.chat_template is not None


def test_a_folder_of_keras_hubs_format_generates_as_the_model_did(tmp_path):
    # KerasHub keeps matrices turned round, and no length of the context but Gemma's.
    model = tiny.causal_lm(num_layers=1, context_length=8192, query_pre_attention_scalar=8)
    model.export_to_keras_hub(tmp_path / "hub")
    again = Gemma2CausalLM.from_preset(tmp_path / "hub")
    assert again.generate("The cat", max_new_tokens=5) == model.generate("The cat", max_new_tokens=5)


def test_a_part_saved_anew_leaves_the_others(model, tmp_path):
    model.save_to_preset(tmp_path / "preset", max_shard_size=0.00001)
    Gemma2Tokenizer(model.preprocessor.tokenizer.proto, parse_special=True).save_to_preset(tmp_path / "preset")
    assert Gemma2Tokenizer.from_preset(tmp_path / "preset").parse_special
    assert Gemma2Backbone.from_preset(tmp_path / "preset").config == model.backbone.config
    # Shards of an earlier save do not stay beside a single file.
    model.backbone.save_to_preset(tmp_path / "preset")
    assert sorted(path.name for path in (tmp_path / "preset").glob("*.safetensors*")) == ["model.safetensors"]
    assert Gemma2CausalLMPreprocessor.from_preset(tmp_path / "preset").tokenizer.parse_special


def test_a_tokenizer_alone_is_a_preset_of_a_tokenizer(model, tmp_path):
    model.preprocessor.tokenizer.save_to_preset(tmp_path / "tokenizer")
    again = Gemma2Tokenizer.from_preset(tmp_path / "tokenizer")
    assert again.encode("The cat") == model.preprocessor.tokenizer.encode("The cat")
    with pytest.raises(ValueError, match=r"no config\.json"):
        Gemma2Backbone.from_preset(tmp_path / "tokenizer")


@pytest.mark.once
def test_whole_numbers_are_written_as_transformers_wants_them(tmp_path):
    backbone = Gemma2Backbone(
        64, 1, 2, 1, 8, 12, 4, 6.0, attention_logit_soft_cap=20, final_logit_soft_cap=9, rope_max_wavelength=500
    )
    backbone.save_to_preset(tmp_path / "preset")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "preset")
    assert (config.query_pre_attn_scalar, config.attn_logit_softcapping, config.final_logit_softcapping) == (
        6,
        20.0,
        9.0,
    )


def test_what_the_user_keeps_in_the_folder_stays(model, tmp_path):
    model.save_to_preset(tmp_path / "preset")
    (tmp_path / "preset" / "notes.txt").write_text("mine")
    model.save_to_preset(tmp_path / "preset" / "epoch1")
    model.save_to_preset(tmp_path / "preset")
    model.preprocessor.tokenizer.save_to_preset(tmp_path / "preset")
    assert (tmp_path / "preset" / "notes.txt").read_text() == "mine"
    for folder in ("preset", "preset/epoch1"):
        assert Gemma2CausalLM.from_preset(tmp_path / folder).preprocessor is not None
    assert [path.name for path in tmp_path.iterdir()] == ["preset"]


@pytest.mark.once
def test_files_that_look_like_ours_stay(model, tmp_path):
    adapted = tiny.causal_lm(num_layers=1)
    adapted.enable_lora(2)
    adapted.export_to_transformers(tmp_path / "preset", merge_adapter=False)
    assert own_settings(tmp_path / "preset")["adapter"] is True
    mine = ("model-old.safetensors", "modelling.safetensors", "adapter/notes.txt")
    for name in mine:
        (tmp_path / "preset" / name).write_text("mine")
    model.save_to_preset(tmp_path / "preset")
    # An adapter that is merged must not lie beside, too; one of the user's own may.
    assert sorted(path.name for path in (tmp_path / "preset" / "adapter").iterdir()) == ["notes.txt"]
    adapted.save_adapter(tmp_path / "preset" / "adapter2")
    model.save_to_preset(tmp_path / "preset")
    model.preprocessor.tokenizer.save_to_preset(tmp_path / "preset")
    assert (tmp_path / "preset" / "adapter2" / "adapter_model.safetensors").exists()
    assert all((tmp_path / "preset" / name).read_text() == "mine" for name in mine)


@pytest.mark.once
def test_files_in_a_folder_of_keras_hubs_format_stay(tmp_path):
    model = tiny.causal_lm(num_layers=1, context_length=8192, query_pre_attention_scalar=8)
    mine = ("notes.json", "best.weights.h5", "assets/picture.png", "assets/tokenizer/notes.txt")
    for exported in (model, model, Gemma2CausalLM(model.backbone)):
        exported.export_to_keras_hub(tmp_path / "hub", max_shard_size=None if exported is model else 1e-5)
        for name in mine:
            (tmp_path / "hub" / name).write_text("mine")
    assert all((tmp_path / "hub" / name).read_text() == "mine" for name in mine)
    # Of what was written before, nothing is left.
    assert not (tmp_path / "hub" / "model.weights.h5").exists()
    assert not (tmp_path / "hub" / "assets" / "tokenizer" / "vocabulary.spm").exists()


@pytest.mark.once
@pytest.mark.parametrize("how", ["one file", "shards", "KerasHub"])
def test_a_load_beside_a_save_takes_one_of_the_models(how, tmp_path, monkeypatch):
    one, other = (tiny.causal_lm(num_layers=1, context_length=8192, query_pre_attention_scalar=8) for _ in range(2))

    def save(model):
        options = {"max_shard_size": 1e-5 if how == "shards" else None}
        if how == "KerasHub":
            model.export_to_keras_hub(tmp_path / "saved", **options)
        else:
            model.save_to_preset(tmp_path / "saved", **options)

    save(one)
    read, calls = WatchedCheckpoint.read, itertools.count()

    def read_while_another_saves(self, name):
        if next(calls) == 3:
            save(other)
        return read(self, name)

    monkeypatch.setattr(WatchedCheckpoint, "read", read_while_another_saves)
    again = Gemma2CausalLM.from_preset(tmp_path / "saved")
    for a, b in zip(again.weights, one.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


@pytest.mark.once
def test_a_folder_that_is_replaced_while_it_is_opened_is_opened_anew(model, tmp_path, monkeypatch):
    other = tiny.causal_lm(num_layers=2)
    model.save_to_preset(tmp_path / "saved", max_shard_size=1e-5)
    opening, calls = presets.open_stored, itertools.count()

    def save_meanwhile(path):
        stored = opening(path)
        if next(calls) < times:
            stored.config()
            (other if next(saves) % 2 == 0 else model).save_to_preset(tmp_path / "saved", max_shard_size=1e-5)
        return stored

    monkeypatch.setattr(presets, "open_stored", save_meanwhile)
    times, saves = 1, itertools.count()
    _, config, checkpoint = presets.opened(tmp_path / "saved")
    assert config == checkpoint.config == other.backbone.config
    times = 100
    with pytest.raises(CheckpointError, match="was replaced 5 times while it was read"):
        presets.opened(tmp_path / "saved")


@pytest.mark.once
def test_a_path_below_the_home_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model.save_to_preset("~/saved")
    assert (tmp_path / "saved" / "config.json").exists()
    assert Gemma2CausalLM.from_preset("~/saved").backbone.config == model.backbone.config


@pytest.mark.once
def test_what_a_killed_save_has_moved_away_is_found_again(model, tmp_path, monkeypatch):
    left = tmp_path / ".preset.0123abcd.old"
    model.save_to_preset(left)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
        with pytest.raises(PresetError, match="killed before its end, and what it left cannot be renamed"):
            Gemma2CausalLM.from_preset(tmp_path / "preset")
    monkeypatch.chdir(tmp_path)
    assert Gemma2CausalLM.from_preset("preset").preprocessor is not None
    # A part that is saved alone finds the others, too.
    (tmp_path / "preset").rename(left)
    model.preprocessor.tokenizer.save_to_preset(tmp_path / "preset")
    assert Gemma2CausalLM.from_preset(tmp_path / "preset").count_params() == model.count_params()
    assert [path.name for path in tmp_path.iterdir()] == ["preset"]


@pytest.mark.once
@pytest.mark.parametrize("folder", [None, 5, ""])
def test_a_folder_that_is_no_path(model, folder):
    with pytest.raises(TypeError, match="must be a path"):
        model.save_to_preset(folder)
