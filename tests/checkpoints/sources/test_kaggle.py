"""Presets from Kaggle, asked of a stand-in on this machine."""

from __future__ import annotations

import errno
import json
import os
import shutil

import kagglehub
import pytest
import requests
from kagglehub import clients, exceptions

from gemma2_keras.checkpoints.hub import resolve
from gemma2_keras.checkpoints.sources import kaggle
from gemma2_keras.errors import CheckpointError, PresetError
from tests.checkpoints.sources.servers import Kaggle, isolate, serving

pytestmark = pytest.mark.once

HANDLE = "keras/gemma2/keras/gemma2_2b_en"
PRESET = f"kaggle://{HANDLE}"
SMALL = {
    "config.json": b'{"class_name": "GemmaBackbone"}',
    "metadata.json": b"{}",
    "task.json": b"{}",
    "tokenizer.json": b"{}",
    "assets/tokenizer/vocabulary.spm": b"pieces",
}
WEIGHTS = {"model.weights.h5": b"weights" * 1000}
SHARDS = {
    "model.weights.json": b'{"weight_map": {"/a": "model_00000.weights.h5", "/b": ["model_00001.weights.h5"]}}',
    "model_00000.weights.h5": b"first",
    "model_00001.weights.h5": b"second",
}
UNWANTED = {"README.md": b"#", "task.weights.h5": b"no", "pytorch_model.bin": b"pickle"}
LICENCE = (
    r"gemma2_2b_en/2 is gated: accept its terms at https://www\.kaggle\.com/models/keras/gemma2, then set "
    r"KAGGLE_API_TOKEN .*kaggle\.json .* ~/\.kaggle\. Meanwhile \"gemma2_tiny_en\" works without any download\."
)


@pytest.fixture
def server(tmp_path, monkeypatch):
    responses = []
    send = requests.Session.send

    def sent(*args, **kwargs):
        responses.append(send(*args, **kwargs))
        return responses[-1]

    # Looks through the sources of the whole call stack, which is deep in tests.
    monkeypatch.setattr(clients, "get_user_agent", lambda: "test")
    with serving(Kaggle({**SMALL, **WEIGHTS, **UNWANTED})) as server:
        isolate(monkeypatch, tmp_path, "http://127.0.0.1:9", server.url)
        monkeypatch.setattr(requests.Session, "send", sent)
        yield server
    # The library leaves open what it did not read to its end.
    for response in responses:
        response.close()


@pytest.fixture
def no_network(monkeypatch):
    """Ends the network, when called."""

    def unplug():
        def refuse(*args, **kwargs):
            raise requests.ConnectionError("unplugged")

        monkeypatch.setattr(requests.Session, "send", refuse)

    return unplug


def names(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_a_preset_comes_with_no_more_than_is_read(server, tmp_path):
    folder = resolve(f"{PRESET}/2")
    assert folder == tmp_path / "kaggle" / "models" / HANDLE / "2"
    assert names(folder) == {*SMALL, *WEIGHTS}
    assert all((folder / name).read_bytes() == content for name, content in {**SMALL, **WEIGHTS}.items())
    assert sorted(server.downloads()) == sorted({*SMALL, *WEIGHTS})


def test_shards_come_as_the_index_says(server):
    server.files = {**SMALL, **SHARDS, **UNWANTED}
    assert names(resolve(f"{PRESET}/2", weights=False)) == {*SMALL, "model.weights.json"}
    assert names(resolve(f"{PRESET}/2")) == {*SMALL, *SHARDS}


def test_without_weights_none_come_and_later_the_rest_does(server):
    folder = resolve(f"{PRESET}/2", weights=False)
    assert names(folder) == {*SMALL}
    assert resolve(f"{PRESET}/2") == folder
    assert names(folder) == {*SMALL, *WEIGHTS}
    assert sorted(server.downloads()) == sorted({*SMALL, *WEIGHTS})


def test_a_checkpoint_of_transformers_is_read_too(server):
    server.files = {"config.json": b"{}", "tokenizer.model": b"pieces", "model.safetensors": b"all", "x.bin": b"no"}
    assert names(resolve("kaggle://google/gemma-2/transformers/gemma-2-2b/2")) == {*server.files} - {"x.bin"}


@pytest.mark.parametrize(("handle", "version"), [(HANDLE, "3"), (f"{HANDLE}/2", "2")])
def test_the_version_asked_for_is_requested(server, handle, version):
    assert resolve(f"kaggle://{handle}").name == version
    asked = {path.split("/")[4] for method, path in server.requests if "/DownloadModelInstanceVersion/" in path}
    assert asked == {version}


def test_all_files_are_of_one_version(server):
    answer = server.answer

    def publish_meanwhile(request):
        answer(request)
        server.version += 1

    server.answer = publish_meanwhile
    folder = resolve(PRESET)
    assert folder.name == "3"
    assert names(folder) == {*SMALL, *WEIGHTS}


def test_what_is_in_the_cache_costs_no_request(server, no_network):
    folder = resolve(f"{PRESET}/2")
    no_network()
    assert resolve(f"{PRESET}/2") == resolve(f"{PRESET}/2", weights=False) == folder


def test_the_newest_version_in_the_cache_serves_without_a_network(server, no_network):
    for server.version in (9, 10, 11):
        folder = resolve(PRESET)
    no_network()
    assert resolve(PRESET) == folder
    assert folder.name == "11"


def test_a_cached_newest_version_costs_one_request(server):
    folder = resolve(PRESET)
    server.requests.clear()
    assert resolve(PRESET) == folder
    assert [path.rpartition("/")[2] for _, path in server.requests] == ["GetModelInstance"]


def test_a_cache_that_keras_hub_filled_serves_without_a_network(server, no_network):
    for name in ("config.json", "tokenizer.json", "assets/tokenizer/vocabulary.spm", "model.weights.h5"):
        path = kagglehub.model_download(f"{HANDLE}/2", name)
    no_network()
    assert resolve(f"{PRESET}/2") == resolve(PRESET) == kaggle.Path(path).parent


def test_a_cache_that_was_filled_as_a_whole_is_taken(server, no_network):
    (folder := kaggle.Path(os.environ["KAGGLEHUB_CACHE"], "models", HANDLE, "2")).mkdir(parents=True)
    (folder / "config.json").write_bytes(SMALL["config.json"])
    (folder / "model.weights.h5").write_bytes(b"weights")
    no_network()
    with pytest.raises(PresetError, match="Kaggle was not reached"):
        resolve(f"{PRESET}/2")
    (folder.parent / "2.complete").touch()
    assert resolve(f"{PRESET}/2") == resolve(PRESET) == folder


@pytest.mark.parametrize("weights", [False, True])
def test_offline_without_a_cache_says_so(server, no_network, weights):
    no_network()
    with pytest.raises(
        PresetError, match=r"gemma2_2b_en could not be fetched from Kaggle .* Kaggle was not reached, and"
    ):
        resolve(PRESET, weights)


def test_offline_with_a_cache_without_weights_says_so(server, no_network):
    folder = resolve(f"{PRESET}/2", weights=False)
    no_network()
    assert resolve(f"{PRESET}/2", weights=False) == folder
    with pytest.raises(PresetError, match="Kaggle was not reached, and not all of it is in the cache"):
        resolve(f"{PRESET}/2")


def test_a_file_that_was_removed_from_the_cache_comes_again(server):
    folder = resolve(f"{PRESET}/2")
    (folder / "assets" / "tokenizer" / "vocabulary.spm").unlink()
    assert names(resolve(f"{PRESET}/2")) == {*SMALL, *WEIGHTS}


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("where", ["/DownloadModelInstanceVersion", "/storage/"])
def test_a_licence_that_is_missing_is_one_message(server, status, where):
    server.fault = lambda method, path: (status, {}) if where in path else None
    with pytest.raises(PresetError, match=LICENCE) as caught:
        resolve(f"{PRESET}/2")
    assert caught.value.__cause__ is not None


def test_credentials_are_sent(server, monkeypatch):
    sent = []
    monkeypatch.setenv("KAGGLE_API_TOKEN", "secret")
    answer = server.answer
    server.answer = lambda request: (sent.append(request.headers.get("Authorization")), answer(request))
    assert kaggle.has_credentials()
    resolve(f"{PRESET}/2", weights=False)
    assert "Bearer secret" in sent


def test_credentials_are_found_where_the_library_looks(server, monkeypatch, tmp_path):
    assert not kaggle.has_credentials()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert kaggle.has_credentials()
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    (tmp_path / "kaggle_config").mkdir()
    (tmp_path / "kaggle_config" / "kaggle.json").write_text(json.dumps({"username": "me", "key": "k"}))
    assert kaggle.has_credentials()


def test_broken_credentials_say_so(server, tmp_path):
    (tmp_path / "kaggle_config").mkdir()
    (tmp_path / "kaggle_config" / "kaggle.json").write_text("{}")
    assert kaggle.has_credentials()
    with pytest.raises(PresetError, match=r"The file with your credentials, kaggle\.json, is broken"):
        resolve(PRESET)


def test_an_unknown_model_says_so(server):
    server.fault = lambda method, path: (404, {})
    for handle in (PRESET, f"{PRESET}/2"):
        with pytest.raises(PresetError, match=r"has no config\.json, or there is no such preset\. Check the handle"):
            resolve(handle)


@pytest.mark.parametrize("left", ["pytorch_model.bin", "model.safetensors"])
def test_weights_in_formats_that_are_not_read_are_not_fetched(server, left):
    server.files = {**SMALL, left: b"weights"}
    with pytest.raises(PresetError, match=r"lacks 'model\.weights\.h5': weights are read from"):
        resolve(f"{PRESET}/2")
    assert left not in server.downloads()


@pytest.mark.parametrize("name", ["../evil.h5", "/etc/passwd", "a/b.h5", "", 5, ["model_0.h5", "../x"]])
def test_an_index_cannot_ask_for_files_elsewhere(server, name):
    server.files = {**SMALL, "model.weights.json": json.dumps({"weight_map": {"a": name}}).encode()}
    with pytest.raises(CheckpointError, match="no plain file name"):
        resolve(f"{PRESET}/2")


def test_a_truncated_file_is_resumed_the_next_time(server):
    # The library writes a MiB at a time.
    server.files["model.weights.h5"] = content = os.urandom(3 * 2**20)
    server.cut = {"model.weights.h5": 2**20 + 777}
    with pytest.raises(PresetError, match=r"The connection broke off in a file\. Ask again: it goes on where it was\."):
        resolve(f"{PRESET}/2")
    sent = []
    answer = server.answer
    server.answer = lambda request: (sent.append(request.headers.get("Range")), answer(request))
    assert (resolve(f"{PRESET}/2") / "model.weights.h5").read_bytes() == content
    assert [span for span in sent if span] == [f"bytes={2**20}-"]


def test_a_truncated_file_is_not_taken_for_whole_without_a_network(server, no_network):
    server.cut = {"model.weights.h5": 777}
    with pytest.raises(PresetError, match="broke off"):
        resolve(f"{PRESET}/2")
    no_network()
    with pytest.raises(PresetError, match="Kaggle was not reached"):
        resolve(f"{PRESET}/2")


def test_another_content_than_announced_is_removed(server):
    server.swapped = {"model.weights.h5": b"WEIGHTS" * 1000}
    with pytest.raises(PresetError, match="A file came with another content than announced: its MD5 differs"):
        resolve(f"{PRESET}/2")
    assert not (resolve(f"{PRESET}/2", weights=False) / "model.weights.h5").exists()
    server.swapped = {}
    assert (resolve(f"{PRESET}/2") / "model.weights.h5").read_bytes() == WEIGHTS["model.weights.h5"]


def test_a_full_disk_says_so(server, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(clients, "_download_file", full)
    with pytest.raises(PresetError, match=r"could not be fetched .*OSError.* The disk is full\. Make room"):
        resolve(PRESET)


def test_a_broken_server_says_so(server):
    server.fault = lambda method, path: (500, {})
    with pytest.raises(PresetError, match="The server answered with status 500: try again later"):
        resolve(PRESET)


@pytest.mark.parametrize(
    "handle",
    ["", "keras/gemma2", "keras/gemma2/keras", "keras/gemma2/keras/..", "../../keras/x", "a/b/keras/c/d",
     "a/b/keras/c/0", "a/b/keras/c/-1", "a/b/keras/c/1/2", "a/b/keras/c?x=1", "a/b/keras/c#x", "a/b/keras/c\0",
     "a /b/keras/c",     "a/b/pyTorch/c", "a//keras/c", "/a/b/keras/c", "é/b/keras/c", "a/b/keras/" + "c" * 5000,
     "a/b/keras/c/" + "9" * 50],
)  # fmt: skip
def test_a_handle_that_is_none_is_refused_before_any_request(server, tmp_path, handle):
    with pytest.raises(
        PresetError, match=r"is no model of Kaggle that is read: give kaggle://owner/model/keras"
    ) as caught:
        resolve(f"kaggle://{handle}")
    assert len(str(caught.value)) < 300
    assert not server.requests
    assert not (tmp_path / "kaggle").exists()


def test_ctrl_c_passes_through_and_the_next_time_it_goes_on(server, monkeypatch):
    with monkeypatch.context() as context:

        def interrupt(response, out_file, *args):
            kaggle.Path(out_file).write_bytes(WEIGHTS["model.weights.h5"][:777])
            raise KeyboardInterrupt

        folder = resolve(f"{PRESET}/2", weights=False)
        context.setattr(clients, "_download_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            resolve(f"{PRESET}/2")
    assert (folder / "model.weights.h5").stat().st_size == 777
    assert (resolve(f"{PRESET}/2") / "model.weights.h5").read_bytes() == WEIGHTS["model.weights.h5"]


def test_a_mounted_folder_is_read_where_it_is(server, monkeypatch, tmp_path):
    """As in Kaggle's notebooks, where files are mounted for reading."""
    mounted = tmp_path / "input" / "2"
    for name, content in {**SMALL, **WEIGHTS}.items():
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_bytes(content)

    def download(handle, name):
        if not (mounted / name).exists():
            raise ValueError(f"You require to have internet enabled: {name!r} is not present in the model files.")
        return str(mounted / name)

    monkeypatch.setattr(kagglehub, "model_download", download)
    assert resolve(PRESET) == resolve(f"{PRESET}/2") == mounted


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (exceptions.UnauthenticatedError(), LICENCE),
        (exceptions.CredentialError("no"), LICENCE),
        (requests.ReadTimeout("no"), "Kaggle was not reached"),
        (RuntimeError("no"), r"could not be fetched from Kaggle \(RuntimeError\)\. Check the connection"),
    ],
)
def test_every_failure_to_fetch_is_one_preset_error(server, monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(kagglehub, "model_download", fail)
    with pytest.raises(PresetError, match=message) as caught:
        resolve(f"{PRESET}/2")
    assert caught.value.__cause__ is error


def test_cached_asks_nothing_and_knows_what_is_missing(server, no_network):
    assert kaggle.cached(HANDLE, True) is None
    folder = resolve(f"{PRESET}/2", weights=False)
    no_network()
    assert kaggle.cached(f"{HANDLE}/2", False) == kaggle.cached(HANDLE, False) == folder
    assert kaggle.cached(f"{HANDLE}/2", True) is None
    assert kaggle.cached(f"{HANDLE}/3", False) is None
    shutil.rmtree(folder)
    assert kaggle.cached(HANDLE, False) is None
