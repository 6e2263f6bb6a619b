"""Parts of a preset saved one by one, as KerasHub's users do."""

from pathlib import Path

import numpy as np
import pytest
import transformers
from keras import ops

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer
from gemma2_keras.errors import PresetError
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
