"""Presets from Google Cloud Storage; a folder stands for its buckets, since TensorFlow asks one address alone."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import types

import pytest

from gemma2_keras.checkpoints.hub import resolve
from gemma2_keras.checkpoints.sources import google_storage
from gemma2_keras.errors import CheckpointError, PresetError

pytestmark = pytest.mark.once

PRESET = "gs://bucket/presets/gemma2"
SMALL = {"config.json": b'{"class_name": "GemmaBackbone"}', "assets/tokenizer/vocabulary.spm": b"pieces"}
WEIGHTS = {"model.weights.h5": b"weights" * 1000}


class NotFoundError(Exception):
    """As TensorFlow names it."""


class PermissionDeniedError(Exception):
    """As TensorFlow names it."""


class Files:
    """What is used of `tf.io.gfile`, with a folder for the root of all buckets."""

    def __init__(self, root):
        self.root = root
        self.copied = []
        self.fault = None
        self.truncate = False

    def _path(self, address):
        if self.fault is not None:
            raise self.fault
        path = self.root / address.removeprefix("gs://")
        if not path.is_file():
            raise NotFoundError(address)
        return path

    def stat(self, address):
        return types.SimpleNamespace(length=self._path(address).stat().st_size)

    def copy(self, address, target):
        content = self._path(address).read_bytes()
        self.copied.append(address.rpartition("/presets/gemma2/")[2])
        with open(target, "wb") as file:
            file.write(content[:10] if self.truncate else content)


@pytest.fixture
def files(tmp_path, monkeypatch):
    for name, content in {**SMALL, **WEIGHTS, "README.md": b"#"}.items():
        path = tmp_path / "bucket" / "presets" / "gemma2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    files = Files(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(io=types.SimpleNamespace(gfile=files)))
    return files


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


RECORD = {".gemma2_keras.fetched.json"}


def test_a_preset_is_copied_below_the_home_of_keras(files, tmp_path):
    folder = resolve(PRESET)
    assert folder == tmp_path / "keras" / "models" / "gemma2_keras" / "gs" / "bucket" / "presets" / "gemma2"
    assert names(folder) == {*SMALL, *WEIGHTS} | RECORD
    assert all((folder / name).read_bytes() == content for name, content in {**SMALL, **WEIGHTS}.items())
    assert resolve(f"{PRESET}/") == folder


def test_without_weights_none_come_and_later_the_rest_does(files):
    folder = resolve(PRESET, weights=False)
    assert names(folder) == {*SMALL} | RECORD
    assert resolve(PRESET) == folder
    assert sorted(files.copied) == sorted({*SMALL, *WEIGHTS})


def test_what_was_copied_needs_no_network_and_no_tensorflow(files, monkeypatch):
    folder = resolve(PRESET)
    files.fault = RuntimeError("unplugged")
    monkeypatch.delitem(sys.modules, "tensorflow")
    assert resolve(PRESET) == resolve(PRESET, weights=False) == folder


def test_tensorflow_is_not_loaded_for_this_alone(files, monkeypatch):
    monkeypatch.delitem(sys.modules, "tensorflow")
    monkeypatch.setattr(google_storage.keras.backend, "backend", lambda: "jax")
    with pytest.raises(PresetError, match=r"gs:// is read through TensorFlow, which is not loaded: set KERAS_BACKEND"):
        resolve(PRESET)
    assert "tensorflow" not in sys.modules


def test_a_broken_copy_leaves_no_file(files):
    resolve(PRESET, weights=False)
    files.truncate = True
    with pytest.raises(PresetError, match=rf"{PRESET} could not be fetched from Google Cloud Storage \(OSError\)"):
        resolve(PRESET)
    folder = resolve(PRESET, weights=False)
    assert names(folder) == {*SMALL} | RECORD
    files.truncate = False
    assert (resolve(PRESET) / "model.weights.h5").read_bytes() == WEIGHTS["model.weights.h5"]


def test_an_unknown_folder_says_so(files):
    with pytest.raises(PresetError, match=r"gs://bucket/other has no config\.json, or there is no such preset"):
        resolve("gs://bucket/other")


def test_missing_weights_are_named(files, tmp_path):
    (tmp_path / "bucket" / "presets" / "gemma2" / "model.weights.h5").unlink()
    with pytest.raises(PresetError, match=r"lacks 'model\.weights\.h5'"):
        resolve(PRESET)


def test_a_broken_configuration_is_a_broken_checkpoint(files, tmp_path):
    (tmp_path / "bucket" / "presets" / "gemma2" / "config.json").write_text("<html>")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        resolve(PRESET)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionDeniedError("no"), "You may not read it: log in with `gcloud auth"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "The disk is full"),
        (RuntimeError("no"), "Check the connection"),
    ],
)
def test_every_failure_to_fetch_is_one_preset_error(files, error, message):
    files.fault = error
    with pytest.raises(PresetError, match=rf"could not be fetched from Google .*{message}") as caught:
        resolve(PRESET)
    assert caught.value.__cause__ is error


def test_ctrl_c_passes_through(files):
    files.fault = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        resolve(PRESET)


@pytest.mark.parametrize(
    "handle",
    ["", "b", "bucket/..", "../bucket", "bucket/../../x", "bucket/./x", "bucket//x", "bucket/a b", "bucket/a?x",
     "bucket/\0", "Bucket/x", "bucket/x\n", "é/x", "bucket/" + "x" * 5000],
)  # fmt: skip
def test_a_handle_that_is_none_is_refused_before_any_request(files, tmp_path, handle):
    with pytest.raises(PresetError, match=r"is no folder of Google Cloud Storage: give gs://bucket/folder") as caught:
        resolve(f"gs://{handle}")
    assert len(str(caught.value)) < 300
    assert not files.copied
    assert not (tmp_path / "keras").exists()


def test_tensorflow_itself_is_asked(tmp_path, monkeypatch):
    """The calls are TensorFlow's own, tried on its files in memory."""
    tensorflow = pytest.importorskip("tensorflow")
    gfile = tensorflow.io.gfile
    root = f"ram://bucket{os.getpid()}"
    for name, content in {**SMALL, **WEIGHTS}.items():
        with gfile.GFile(f"{root}/{name}", "wb") as file:
            file.write(content)

    class InMemory:
        stat = staticmethod(lambda address: gfile.stat(address.replace("gs://bucket/presets/gemma2", root)))
        copy = staticmethod(lambda address, path: gfile.copy(address.replace("gs://bucket/presets/gemma2", root), path))

    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(google_storage, "_file_system", InMemory)
    folder = resolve(PRESET)
    assert names(folder) == {*SMALL, *WEIGHTS} | RECORD
    shutil.rmtree(folder)
