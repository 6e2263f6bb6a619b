"""Presets from Hugging Face, asked of a stand-in on this machine."""

from __future__ import annotations

import errno
import importlib
import json
import os
import types
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors, file_download
from huggingface_hub.utils import close_session

from gemma2_keras.checkpoints.hub import resolve
from gemma2_keras.checkpoints.sources import hugging_face
from gemma2_keras.errors import CheckpointError, PresetError
from tests.checkpoints.sources.servers import COMMIT, HuggingFace, isolate, serving

pytestmark = pytest.mark.once

OTHER_COMMIT = "f" * 40
INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
SHARDED = {
    "config.json": b'{"model_type": "gemma2"}',
    "generation_config.json": b"{}",
    "tokenizer.model": b"pieces",
    "tokenizer.json": b'{"version": "1.0"}',
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-00001-of-00002.safetensors": b"first" * 1000,
    "model-00002-of-00002.safetensors": b"second" * 1000,
    # Nobody wants these.
    "README.md": b"# A model",
    "pytorch_model.bin": b"pickle",
    "gemma.gguf": b"GGUF",
    "consolidated.safetensors": b"all of it once more",
    "modeling.py": b"import os",
    "original/model-00001-of-00002.safetensors": b"old",
    "model.weights.h5": b"of Keras",
}
SMALL = {"config.json", "generation_config.json", "tokenizer.model", "tokenizer.json", "model.safetensors.index.json"}
WEIGHTS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
KERAS_HUB = {
    "config.json": b'{"class_name": "GemmaBackbone"}',
    "metadata.json": b'{"keras_version": "3.15"}',
    "task.json": b'{"class_name": "GemmaCausalLM"}',
    "preprocessor.json": b"{}",
    "tokenizer.json": b'{"class_name": "GemmaTokenizer"}',
    "assets/tokenizer/vocabulary.spm": b"pieces",
    "model.weights.json": b'{"weight_map": {"/a": "model_00000.weights.h5", "/b": ["model_00001.weights.h5"]}}',
    "model_00000.weights.h5": b"first",
    "model_00001.weights.h5": b"second",
    "task.weights.h5": b"no",
}
LICENCE = (
    r"someone/model is gated: accept its terms at https://huggingface\.co/someone/model, then set HF_TOKEN .*"
    r"`hf auth login`\. Meanwhile \"gemma2_tiny_en\" works without any download\."
)


@pytest.fixture
def server(tmp_path, monkeypatch):
    close_session()
    with serving(HuggingFace(SHARDED)) as server:
        isolate(monkeypatch, tmp_path, server.url, "http://127.0.0.1:9")
        yield server
        # Its connections are of this test's server.
        close_session()


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()


def test_a_checkpoint_comes_with_no_more_than_is_read(server):
    folder = resolve("hf://someone/model")
    assert names(folder) == SMALL | WEIGHTS
    assert all((folder / name).read_bytes() == SHARDED[name] for name in SMALL | WEIGHTS)
    assert sorted(server.downloads()) == sorted(SMALL | WEIGHTS)


def test_without_weights_none_come_and_later_the_rest_does(server):
    folder = resolve("hf://someone/model", weights=False)
    assert names(folder) == SMALL
    assert resolve("hf://someone/model") == folder
    assert names(folder) == SMALL | WEIGHTS
    assert sorted(server.downloads()) == sorted(SMALL | WEIGHTS)


@pytest.mark.parametrize("single", [False, True])
def test_a_preset_of_keras_hub_comes_whole(server, single):
    server.files = dict(KERAS_HUB)
    if single:
        for name in ("model.weights.json", "model_00000.weights.h5", "model_00001.weights.h5"):
            del server.files[name]
        server.files["model.weights.h5"] = b"all"
    wanted = set(server.files) - {"task.weights.h5"}
    assert names(resolve("hf://someone/model", weights=False)) == {name for name in wanted if "weights.h5" not in name}
    assert names(resolve("hf://someone/model")) == wanted


def test_one_of_ours_comes_with_our_own_file(server):
    server.files = {"config.json": b"{}", "gemma2_keras.json": b"{}", "model.safetensors": b"all"}
    assert names(resolve("hf://someone/model")) == set(server.files)


def test_a_tokenizer_of_ours_needs_no_weights(server):
    server.files = {"gemma2_keras.json": b"{}", "tokenizer.model": b"pieces"}
    assert names(resolve("hf://someone/model")) == set(server.files)


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/2", COMMIT])
def test_the_revision_asked_for_is_requested(server, revision):
    server.revisions = {"main", "v1.0", "refs/pr/2"}
    assert resolve(f"hf://someone/model@{revision}").name == COMMIT
    asked = [path for _, path in server.requests if "/revision/" in path]
    assert [path.partition("/revision/")[2] for path in asked] == ([revision] * (revision != COMMIT))


def test_an_unknown_revision_says_so(server):
    with pytest.raises(PresetError, match=r"someone/model on Hugging Face has no revision 'v2'"):
        resolve("hf://someone/model@v2")


def test_a_pinned_commit_stays_when_the_branch_moves(server):
    folder = resolve(f"hf://someone/model@{COMMIT}")
    server.commit = OTHER_COMMIT
    assert resolve(f"hf://someone/model@{COMMIT}") == folder
    assert resolve("hf://someone/model").name == OTHER_COMMIT


def test_a_commit_is_not_asked_for_where_nobody_answers(server, monkeypatch):
    folder = resolve(f"hf://someone/model@{COMMIT}")
    download, asked = huggingface_hub.snapshot_download, []

    def counted(*args, local_files_only=False, **kwargs):
        if not local_files_only:
            asked.append(args)
        return download(*args, local_files_only=local_files_only, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", counted)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve(f"hf://someone/model@{COMMIT}") == folder
    with pytest.raises(PresetError, match="could not be fetched from Hugging Face"):
        resolve(f"hf://someone/model@{OTHER_COMMIT}")
    assert not asked


def test_weights_are_of_the_commit_of_the_configuration(server, monkeypatch):
    layout_read = hugging_face.weight_files

    def push_meanwhile(folder):
        server.revisions, server.commit = set(), COMMIT
        return layout_read(folder)

    monkeypatch.setattr(hugging_face, "weight_files", push_meanwhile)
    assert names(resolve("hf://someone/model")) == SMALL | WEIGHTS


def test_what_is_in_the_cache_costs_one_request(server):
    folder = resolve("hf://someone/model")
    server.requests.clear()
    assert resolve("hf://someone/model") == folder
    assert server.requests == [("GET", "/api/models/someone/model/revision/main")]


@pytest.mark.parametrize("down", ["offline", "refused", 401, 403, 500])
def test_a_cache_serves_where_the_network_does_not(server, monkeypatch, down):
    folder = resolve("hf://someone/model")
    if down == "offline":
        offline(monkeypatch)
    elif down == "refused":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        server.fault = lambda method, path: (down, {})
    server.requests.clear()
    assert resolve("hf://someone/model") == folder
    assert not server.downloads()


def test_offline_without_a_cache_says_so(server, monkeypatch):
    offline(monkeypatch)
    with pytest.raises(PresetError, match=r"someone/model could not be fetched .* HF_HUB_OFFLINE is set, and not all"):
        resolve("hf://someone/model")
    assert not server.requests


def test_offline_with_a_cache_without_weights_says_so(server, monkeypatch):
    folder = resolve("hf://someone/model", weights=False)
    offline(monkeypatch)
    assert resolve("hf://someone/model", weights=False) == folder
    with pytest.raises(PresetError, match="HF_HUB_OFFLINE is set, and not all of it is in the cache"):
        resolve("hf://someone/model")


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (401, {"X-Error-Code": "GatedRepo"}),
        (403, {"X-Error-Code": "GatedRepo"}),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        (403, {"X-Error-Message": "Please enable access to public gated repositories in your token settings"}),
    ],
    ids=["no token", "licence", "wrong token", "narrow token"],
)
@pytest.mark.parametrize("where", ["/api/models/", "/resolve/"])
def test_a_licence_that_is_missing_is_one_message(server, status, headers, where):
    server.fault = lambda method, path: (status, headers) if where in path else None
    with pytest.raises(PresetError, match=LICENCE) as caught:
        resolve("hf://someone/model")
    assert caught.value.__cause__ is not None
    assert not server.downloads()


def test_a_token_is_sent(server, monkeypatch):
    sent = []
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    answer = server.answer
    server.answer = lambda request: (sent.append(request.headers.get("Authorization")), answer(request))
    assert hugging_face.has_token()
    resolve("hf://someone/model", weights=False)
    assert set(sent) == {"Bearer hf_secret"}


@pytest.mark.parametrize("status", [401, 404])
def test_an_unknown_repository_says_so(server, status):
    server.fault = lambda method, path: (status, {"X-Error-Code": "RepoNotFound"})
    with pytest.raises(PresetError, match="Hugging Face has no model 'someone/model' that you may read"):
        resolve("hf://someone/model")


def test_a_repository_without_configuration_is_none(server):
    del server.files["config.json"]
    with pytest.raises(PresetError, match=r"someone/model has no config\.json: it is no preset"):
        resolve("hf://someone/model")


@pytest.mark.parametrize("left", ["pytorch_model.bin", "gemma.gguf", "model.weights.h5"])
def test_weights_in_formats_that_are_not_read_are_not_fetched(server, left):
    server.files = {"config.json": b"{}", left: b"weights"}
    with pytest.raises(PresetError, match=r"someone/model lacks 'model\.safetensors': weights are read from"):
        resolve("hf://someone/model")
    assert server.downloads() == ["config.json"]


def test_a_shard_that_the_repository_lacks_is_named(server):
    del server.files["model-00002-of-00002.safetensors"]
    with pytest.raises(PresetError, match=r"lacks 'model-00002-of-00002\.safetensors'"):
        resolve("hf://someone/model")


def test_a_file_that_is_listed_and_not_there_says_so(server):
    server.fault = lambda method, path: (
        (404, {"X-Error-Code": "EntryNotFound"}) if path.endswith("00002.safetensors") else None
    )
    with pytest.raises(PresetError, match="A file that the repository lists is not there"):
        resolve("hf://someone/model")


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "", 5])
def test_an_index_cannot_ask_for_files_elsewhere(server, name):
    server.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": name}}).encode()
    with pytest.raises(CheckpointError, match="no plain file name"):
        resolve("hf://someone/model")


@pytest.mark.parametrize("index", [b"{}", b"<html>", b'{"weight_map": []}'])
def test_a_broken_index_is_a_broken_checkpoint(server, index):
    server.files["model.safetensors.index.json"] = index
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        resolve("hf://someone/model")


def test_a_file_name_is_no_pattern(server):
    server.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": "*"}}).encode()
    with pytest.raises(PresetError, match=r"lacks '\*'"):
        resolve("hf://someone/model")
    assert not [name for name in server.downloads() if name.endswith((".bin", ".safetensors", ".py"))]


def test_a_truncated_file_is_resumed(server):
    server.cut = {"model-00001-of-00002.safetensors": 777}
    folder = resolve("hf://someone/model")
    assert (folder / "model-00001-of-00002.safetensors").read_bytes() == b"first" * 1000
    assert server.downloads().count("model-00001-of-00002.safetensors") == 2


def test_a_file_that_stays_truncated_leaves_nothing_and_comes_the_next_time(server, monkeypatch):
    # The library waits a second between its attempts.
    monkeypatch.setattr(file_download, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    server.cut, server.cuts = {"model-00002-of-00002.safetensors": 777}, 1000
    with pytest.raises(PresetError, match=r"could not be fetched .* The connection broke off in a file\. Ask again"):
        resolve("hf://someone/model")
    folder = resolve("hf://someone/model", weights=False)
    assert not (folder / "model-00002-of-00002.safetensors").exists()
    before = server.downloads().count("model-00001-of-00002.safetensors")
    server.cuts = 0
    assert (resolve("hf://someone/model") / "model-00002-of-00002.safetensors").read_bytes() == b"second" * 1000
    # What was whole is kept.
    assert server.downloads().count("model-00001-of-00002.safetensors") == max(before, 1)


def test_another_content_than_announced_is_removed(server):
    name = "model-00001-of-00002.safetensors"
    server.swapped = {name: b"FIRST" * 1000}
    with pytest.raises(PresetError, match=rf"{name} of someone/model came .* its SHA-256 is [0-9a-f]{{64}}\. It was"):
        resolve("hf://someone/model")
    folder = resolve("hf://someone/model", weights=False)
    assert not os.path.lexists(folder / name)
    server.swapped = {}
    assert (resolve("hf://someone/model") / name).read_bytes() == b"first" * 1000


def test_what_is_in_the_cache_is_not_hashed_again(server, monkeypatch):
    hashed = []
    check = hugging_face._check
    monkeypatch.setattr(
        hugging_face, "_check", lambda file, repository: (hashed.append(file.name), check(file, repository))
    )
    resolve("hf://someone/model", weights=False)
    assert set(hashed) == SMALL
    hashed.clear()
    resolve("hf://someone/model")
    assert set(hashed) == WEIGHTS
    hashed.clear()
    resolve("hf://someone/model")
    assert not hashed


def test_a_full_disk_says_so(server, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(PresetError, match=r"could not be fetched .*OSError.* The disk is full\. Make room"):
        resolve("hf://someone/model")


def test_a_broken_server_says_so(server):
    server.fault = lambda method, path: (500, {})
    with pytest.raises(PresetError, match="The server answered with status 500: try again later"):
        resolve("hf://someone/model")


@pytest.mark.parametrize(
    "handle",
    ["", "a/b/c", "../x", " a/b", "a/b ", "a/..", "a/b?x=1", "a/b#x", "a/b\0", "a b/c", "a/b%2f", "https://x/y", "a\\b",
     "./a", "a/b.git", "é/b", "a/" + "b" * 5000],
)  # fmt: skip
def test_a_handle_that_is_none_is_refused_before_any_request(server, handle):
    with pytest.raises(PresetError, match="Hugging Face has no model") as caught:
        resolve(f"hf://{handle}")
    assert len(str(caught.value)) < 300
    assert not server.requests


@pytest.mark.parametrize(
    "revision", ["", "..", "../x", "a/../b", "/a", "a//b", "a b", "a?b", "a#b", "\0", "a" * 500, "a@b"]
)
def test_a_revision_that_is_none_is_refused_before_any_request(server, revision):
    with pytest.raises(PresetError, match="is no revision of someone/model") as caught:
        resolve(f"hf://someone/model@{revision}")
    assert len(str(caught.value)) < 300
    assert not server.requests


def test_ctrl_c_passes_through(server, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(file_download, "http_get", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve("hf://someone/model")


def test_cached_asks_nothing_and_knows_what_is_missing(server):
    assert hugging_face.cached("someone/model", True) is None
    folder = resolve("hf://someone/model", weights=False)
    server.requests.clear()
    assert hugging_face.cached("someone/model", False) == folder
    assert hugging_face.cached(f"someone/model@{COMMIT}", False) == folder
    assert hugging_face.cached("someone/model", True) is None
    assert hugging_face.cached(f"someone/model@{OTHER_COMMIT}", False) is None
    assert not server.requests
    resolve("hf://someone/model")
    assert hugging_face.cached("someone/model", True) == folder


def test_a_cache_that_another_program_filled_is_completed(server):
    for name in ("config.json", "model.safetensors.index.json", *WEIGHTS):
        huggingface_hub.hf_hub_download("someone/model", name)
    assert hugging_face.cached("someone/model", True) is None
    folder = resolve("hf://someone/model")
    assert names(folder) == SMALL | WEIGHTS
    assert hugging_face.cached("someone/model", True) == folder


def test_a_cache_that_transformers_filled_is_enough(server):
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", *WEIGHTS):
        folder = Path(huggingface_hub.hf_hub_download("someone/model", name)).parent
    assert hugging_face.cached("someone/model", True) == folder


# The HTTP library that this version of huggingface_hub works with.
HTTP = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])


def _with_response(kind, status=403):
    return kind("no", response=HTTP.Response(status, request=HTTP.Request("GET", "https://huggingface.co")))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: _with_response(errors.GatedRepoError), LICENCE),
        (lambda: _with_response(errors.HfHubHTTPError), LICENCE),
        (lambda: _with_response(errors.RepositoryNotFoundError), "no model 'someone/model' that you may read"),
        (lambda: _with_response(errors.DisabledRepoError), "The server answered with status 403"),
        (lambda: _with_response(errors.HfHubHTTPError, 429), r"could not be fetched .*HfHubHTTPError.* status 429"),
        (lambda: errors.LocalEntryNotFoundError("no"), r"could not be fetched .*LocalEntryNotFoundError"),
        (lambda: errors.OfflineModeIsEnabled("no"), r"could not be fetched .*OfflineModeIsEnabled"),
        (lambda: OSError(28, "No space left on device"), r"could not be fetched .*OSError.*disk is full"),
        (lambda: PermissionError(13, "no"), r"could not be fetched .*PermissionError.*cache cannot be written to"),
        (lambda: OSError("Consistency check failed"), r"could not be fetched .*OSError.*broke off"),
        (lambda: TimeoutError("no"), r"could not be fetched .*TimeoutError.*Check the connection"),
        (lambda: ConnectionResetError("no"), r"could not be fetched .*ConnectionResetError.*Check the connection"),
        (lambda: HTTP.ConnectError("no"), r"could not be fetched .*ConnectError.*Check the connection"),
        (lambda: HTTP.ReadTimeout("no"), r"could not be fetched .*ReadTimeout.*Check the connection"),
        (lambda: HTTP.ProxyError("no"), r"could not be fetched .*ProxyError.*Check the connection"),
        (lambda: HTTP.RemoteProtocolError("no"), r"could not be fetched .*RemoteProtocolError.*broke off"),
        (lambda: HTTP.ReadError("no"), r"could not be fetched .*ReadError.*broke off"),
    ],
)
def test_every_failure_to_fetch_is_one_preset_error(monkeypatch, error, message):
    def fail(*args, **kwargs):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(PresetError, match=message) as caught:
        resolve("hf://someone/model")
    assert caught.value.__cause__ is not None
