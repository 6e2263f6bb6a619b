from __future__ import annotations

import json
import shutil

import pytest

from gemma2_keras import Gemma2CausalLM
from gemma2_keras.checkpoints.stored import open_stored
from gemma2_keras.errors import CheckpointError
from tests.preprocessing import tiny

pytestmark = pytest.mark.once


@pytest.fixture
def folder(tmp_path):
    tiny.causal_lm(num_layers=1, dropout=0.25).save_to_preset(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_folder_of_ours_answers(folder):
    stored = open_stored(folder)
    assert stored.config() == tiny.backbone(num_layers=1, dropout=0.25).config
    assert stored.dtype() == stored.checkpoint().dtype == "float32"
    assert stored.proto() == tiny.proto()
    assert stored.settings("tokenizer") == {"parse_special": False}
    assert stored.settings("preprocessor")["sequence_length"] == 16


def test_nothing_is_read_before_it_is_asked_for(folder):
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text("{}")
    assert open_stored(folder).proto() == tiny.proto()
    with pytest.raises(CheckpointError, match="`model_type` is None"):
        open_stored(folder).config()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model", "gemma2_keras.json"])
def test_links_that_lead_out_are_refused(folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is a link that leads out of its folder: put the file itself"):
        Gemma2CausalLM.from_preset(folder)


def test_links_within_the_folder_and_within_the_cache_of_hugging_face_are_followed(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert Gemma2CausalLM.from_preset(folder)
    repository = tmp_path / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    snapshot = repository / "snapshots" / "0123"
    shutil.move(folder, snapshot)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "weights").rename(repository / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert Gemma2CausalLM.from_preset(snapshot)
    # A folder that is named so is no way around.
    (snapshot / "model.safetensors").unlink()
    (repository / "blobs" / "abc").rename(tmp_path / "abc")
    (snapshot / "model.safetensors").symlink_to("../../../abc")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        Gemma2CausalLM.from_preset(snapshot)


def test_the_format_is_told_by_the_configuration(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "registered_name": "keras_hub>GemmaBackbone"}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_stored(folder).config()
