from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from gemma2_keras import describe_preset
from gemma2_keras.checkpoints import hub
from gemma2_keras.checkpoints.hub import resolve
from gemma2_keras.errors import PresetError

pytestmark = pytest.mark.once
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint's folder, as far as `resolve` looks, that is the current folder too."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine"


def test_a_folder_is_taken_as_it_is(folder):
    assert resolve(folder) == resolve(str(folder)) == folder
    assert resolve("./mine") == resolve("mine") == Path("mine")


@pytest.mark.parametrize("name", ["", " ", "\n"])
def test_an_empty_name_is_not_the_current_folder(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    with pytest.raises(PresetError, match="`preset` is empty: give a name"):
        resolve(name)
    assert resolve(".") == Path(".")


def test_a_name_of_the_catalogue_comes_before_a_folder_of_that_name(folder, monkeypatch):
    folder.rename("gemma2_2b_en")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.append(name) or "/elsewhere")
    assert resolve("gemma2_2b_en") == Path("/elsewhere")
    assert resolve("./gemma2_2b_en") == Path("gemma2_2b_en")
    assert asked == ["google/gemma-2-2b"]


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("gemma2_2b", "There is no preset 'gemma2_2b'. Did you mean .*gemma2_2b_en"),
        ("zzzz", "No name is like it"),
        ("empty", "The folder empty has no config.json"),
        ("mine/config.json", "config.json is a file; give the folder that holds it"),
        ("./absent", "There is no folder absent"),
        ("absent/deeper", "There is no folder absent/deeper"),
        ("kaggle://keras/gemma2", r"of a kind that is not read; allowed: hf://owner/name"),
        ("https://huggingface.co/google/gemma-2-2b", "of a kind that is not read"),
        (None, "must be a name, a handle or a folder; given NoneType"),
        (5, "given int"),
        (b"mine", "given bytes"),
        (["mine"], "given list"),
        ("nul\0byte", "no preset"),
    ],
)
def test_what_leads_nowhere_says_why(folder, preset, message):
    Path("empty").mkdir()
    with pytest.raises(PresetError, match=message):
        resolve(preset)


def test_an_installation_without_the_weights_says_so(monkeypatch):
    entry = dataclasses.replace(describe_preset("gemma2_2b_en"), hugging_face=None)
    monkeypatch.setattr(hub, "describe_preset", lambda name: entry)
    with pytest.raises(PresetError, match="weights of gemma2_2b_en are missing from this installation"):
        resolve("gemma2_2b_en")


def test_a_handle_is_fetched_with_no_more_than_a_checkpoint_needs(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(name=name, **kw) or str(tmp_path)
    )
    assert resolve("hf://someone/model") == tmp_path
    assert asked["name"] == "someone/model"
    assert "tokenizer.model" in asked["allow_patterns"]
    # Neither code nor pickles.
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked["allow_patterns"])


# The HTTP library that this version of huggingface_hub works with.
HTTP = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])


def _with_response(kind):
    return kind("no", response=HTTP.Response(403, request=HTTP.Request("GET", "https://huggingface.co")))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: _with_response(errors.GatedRepoError), "someone/model is gated: accept its terms"),
        (lambda: _with_response(errors.RepositoryNotFoundError), "no model 'someone/model' that you may read"),
        (lambda: errors.HFValidationError("no"), "no model 'someone/model' that you may read"),
        (lambda: _with_response(errors.HfHubHTTPError), r"could not be fetched .*HfHubHTTPError"),
        (lambda: errors.LocalEntryNotFoundError("no"), r"could not be fetched .*LocalEntryNotFoundError"),
        (lambda: errors.OfflineModeIsEnabled("no"), r"could not be fetched .*OfflineModeIsEnabled"),
        (lambda: OSError(28, "No space left on device"), r"could not be fetched .*OSError"),
        (lambda: TimeoutError("no"), r"could not be fetched .*TimeoutError"),
        (lambda: ConnectionResetError("no"), r"could not be fetched .*ConnectionResetError"),
        (lambda: HTTP.ConnectError("no"), r"could not be fetched .*ConnectError"),
        (lambda: HTTP.ReadTimeout("no"), r"could not be fetched .*ReadTimeout"),
        (lambda: HTTP.ProxyError("no"), r"could not be fetched .*ProxyError"),
        (lambda: HTTP.RemoteProtocolError("no"), r"could not be fetched .*RemoteProtocolError"),
    ],
)
def test_every_failure_to_fetch_is_one_preset_error(monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(PresetError, match=message):
        resolve("hf://someone/model")


@pytest.mark.parametrize("handle", ["hf://", "hf://a/b/c", "hf://../x", "hf:// a/b"])
def test_a_handle_that_is_none_is_refused(handle):
    with pytest.raises(PresetError, match="Hugging Face has no model"):
        resolve(handle)


@pytest.mark.parametrize(
    ("variable", "value"), [("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", "http://127.0.0.1:9")], ids=["offline", "refused"]
)
def test_without_a_network_a_handle_fails_fast(tmp_path, variable, value):
    # Read when huggingface_hub is first imported, so in a process of its own.
    script = "from gemma2_keras.checkpoints.hub import resolve; resolve('hf://someone/model')"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path), variable: value},
        capture_output=True,
        text=True,
        timeout=120,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("gemma2_keras.errors.PresetError: someone/model could not be fetched from Hugging Face")
    assert time.monotonic() - start < 60
