from __future__ import annotations

import concurrent.futures
import dataclasses
import time
from pathlib import Path

import pytest
from huggingface_hub.utils import close_session
from kagglehub import clients

from gemma2_keras import describe_preset
from gemma2_keras.checkpoints import hub
from gemma2_keras.checkpoints.hub import resolve
from gemma2_keras.checkpoints.sources import hugging_face, kaggle
from gemma2_keras.errors import PresetError
from tests.checkpoints.sources.servers import COMMIT, HuggingFace, Kaggle, in_a_process, isolate, serving

pytestmark = pytest.mark.once
NOBODY = "http://127.0.0.1:9"


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
    monkeypatch.setattr(hugging_face, "fetch", lambda handle, weights: asked.append(handle) or Path("/elsewhere"))
    monkeypatch.setattr(hugging_face, "cached", lambda handle, weights: None)
    monkeypatch.setattr(kaggle, "cached", lambda handle, weights: None)
    monkeypatch.setattr(kaggle, "has_credentials", lambda: False)
    assert resolve("gemma2_2b_en") == Path("/elsewhere")
    assert resolve("./gemma2_2b_en") == Path("gemma2_2b_en")
    assert [handle.partition("@")[0] for handle in asked] == ["google/gemma-2-2b"]


def test_a_file_of_gguf_is_taken_as_it_is(folder):
    Path("model.gguf").write_bytes(b"GGUF")
    Path("MODEL.GGUF").write_bytes(b"GGUF")
    assert resolve("model.gguf") == resolve(Path("model.gguf"), weights=False) == Path("model.gguf")
    assert resolve("MODEL.GGUF") == Path("MODEL.GGUF")


def test_a_folder_may_be_called_like_a_file(folder):
    folder.rename("model.gguf")
    assert resolve("model.gguf") == Path("model.gguf")


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("gemma2_2b", "There is no preset 'gemma2_2b'. Did you mean .*gemma2_2b_en"),
        ("zzzz", "No name is like it"),
        ("empty", "The folder empty has no config.json"),
        ("mine/config.json", "config.json is a file; give the folder that holds it"),
        ("./absent", "There is no folder absent"),
        ("absent/deeper", "There is no folder absent/deeper"),
        ("absent.gguf", r"There is no file absent\.gguf"),
        ("./absent.gguf", r"There is no file absent\.gguf"),
        ("kaggle://keras/gemma2", r"is no model of Kaggle that is read: give kaggle://owner/model/keras/variation"),
        ("gs://x", r"is no folder of Google Cloud Storage: give gs://bucket/folder"),
        (
            "s3://bucket/folder",
            r"of a kind that is not read; allowed: hf://owner/name\[@revision\], kaggle://.*, gs://",
        ),
        ("x" * 3000 + "://y", "of a kind that is not read"),
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


def _described(monkeypatch, **changes):
    entry = describe_preset("gemma2_2b_en")
    known = {field.name for field in dataclasses.fields(entry)}
    plain = {"hugging_face_revision": None, "kaggle": None, **changes}
    changed = dataclasses.replace(entry, **{name: value for name, value in plain.items() if name in known})
    for name in set(plain) - known:
        object.__setattr__(changed, name, plain[name])
    monkeypatch.setattr(hub, "describe_preset", lambda name: changed)


def test_an_installation_without_the_weights_says_so(monkeypatch):
    _described(monkeypatch, hugging_face=None)
    with pytest.raises(PresetError, match="weights of gemma2_2b_en are missing from this installation"):
        resolve("gemma2_2b_en")


@pytest.fixture
def both(tmp_path, monkeypatch):
    """Hugging Face and Kaggle, without any account, as the sources of `gemma2_2b_en`."""
    close_session()
    small = {"config.json": b"{}", "tokenizer.model": b"pieces"}
    with (
        serving(HuggingFace({**small, "model.safetensors": b"there"})) as one,
        serving(Kaggle({**small, "model.safetensors": b"here"})) as other,
    ):
        isolate(monkeypatch, tmp_path, one.url, other.url)
        monkeypatch.setattr(clients, "get_user_agent", lambda: "test")
        _described(monkeypatch, kaggle="keras/gemma2/keras/gemma2_2b_en/2")
        yield one, other
        close_session()


@pytest.mark.parametrize(
    ("variables", "source"),
    [
        ({}, b"there"),
        ({"HF_TOKEN": "hf_x"}, b"there"),
        ({"KAGGLE_API_TOKEN": "x"}, b"here"),
        ({"KAGGLE_USERNAME": "me", "KAGGLE_KEY": "x"}, b"here"),
        ({"HF_TOKEN": "hf_x", "KAGGLE_API_TOKEN": "x"}, b"there"),
    ],
    ids=["no account", "Hugging Face", "Kaggle", "Kaggle by name", "both"],
)
def test_a_name_comes_from_where_the_user_has_an_account(both, monkeypatch, variables, source):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (resolve("gemma2_2b_en") / "model.safetensors").read_bytes() == source
    # From one, not from both.
    assert not all(server.downloads() for server in both)


def test_a_name_on_kaggle_alone_comes_from_there(both, monkeypatch):
    _described(monkeypatch, hugging_face=None, kaggle="keras/gemma2/keras/gemma2_2b_en/2")
    assert (resolve("gemma2_2b_en") / "model.safetensors").read_bytes() == b"here"


@pytest.mark.parametrize("source", [0, 1])
def test_a_name_that_is_in_a_cache_is_not_asked_for(both, monkeypatch, source):
    handle = ("hf://google/gemma-2-2b", "kaggle://keras/gemma2/keras/gemma2_2b_en/2")[source]
    folder = resolve(handle)
    # Whatever account there is.
    monkeypatch.setenv(("KAGGLE_API_TOKEN", "HF_TOKEN")[source], "x")
    for server in both:
        server.requests.clear()
    assert resolve("gemma2_2b_en") == resolve("gemma2_2b_en", weights=False) == folder
    assert not both[0].requests
    assert not both[1].requests


def test_a_cache_without_weights_serves_until_weights_are_wanted(both):
    folder = resolve("gemma2_2b_en", weights=False)
    assert not (folder / "model.safetensors").exists()
    both[0].requests.clear()
    assert resolve("gemma2_2b_en", weights=False) == folder
    assert not both[0].requests
    assert resolve("gemma2_2b_en") == folder
    assert both[0].downloads() == ["model.safetensors"]


def test_the_pinned_revision_of_a_name_is_what_comes(both, monkeypatch):
    _described(monkeypatch, hugging_face_revision=COMMIT)
    both[0].revisions = set()
    assert resolve("gemma2_2b_en").name == COMMIT
    assert not [path for _, path in both[0].requests if "/revision/" in path]


def test_a_name_whose_licence_is_missing_says_what_to_do(both):
    both[0].fault = lambda method, path: (401, {"X-Error-Code": "GatedRepo"}) if "/resolve/" in path else None
    with pytest.raises(
        PresetError, match=r"accept its terms at https://huggingface\.co/google/gemma-2-2b, then set HF"
    ):
        resolve("gemma2_2b_en")


def test_without_a_network_a_handle_fails_fast(tmp_path, monkeypatch):
    close_session()
    isolate(monkeypatch, tmp_path, NOBODY, NOBODY)
    start = time.monotonic()
    for handle, source in (("hf://someone/model", "Hugging Face"), ("kaggle://a/b/keras/c", "Kaggle")):
        with pytest.raises(PresetError, match=f"could not be fetched from {source}"):
            resolve(handle)
    assert time.monotonic() - start < 30


def test_the_libraries_read_what_the_user_sets(tmp_path):
    process = in_a_process("resolve('hf://someone/model')", tmp_path, NOBODY, NOBODY, HF_HUB_OFFLINE="1")
    _, errors = process.communicate(timeout=120)
    assert "PresetError: someone/model could not be fetched from Hugging Face" in errors.strip().splitlines()[-1]
    assert "HF_HUB_OFFLINE is set" in errors.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("source", "handle"), [(0, "hf://someone/model"), (1, "kaggle://someone/model/keras/variation/2")]
)
def test_two_processes_at_once_both_get_it_whole(both, tmp_path, source, handle):
    server = both[source]
    server.files["model.safetensors"] = b"weights" * 10**6
    server.gate.clear()
    other = in_a_process(f"print(resolve({handle!r}))", tmp_path, both[0].url, both[1].url)
    # The other one is in the middle of its first file.
    while not server.downloads() and other.poll() is None:
        time.sleep(0.01)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        mine = pool.submit(resolve, handle)
        time.sleep(0.5)
        server.gate.set()
        folder = mine.result(timeout=120)
        output, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors
    assert output.splitlines()[-1] == str(folder)
    assert all((folder / name).read_bytes() == content for name, content in server.files.items())
    # One waited for the other, and found all there.
    assert sorted(server.downloads()) == sorted(server.files)
