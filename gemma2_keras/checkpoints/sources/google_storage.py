"""Presets from Google Cloud Storage, through TensorFlow, where it is in use anyway."""

from __future__ import annotations

import os
import re
import sys
import uuid
from pathlib import Path
from typing import Any

import keras

from gemma2_keras.checkpoints.sources.fetching import alone_in, did_not_come, fetch_by_name, was_fetched
from gemma2_keras.errors import CheckpointError, PresetError

PREFIX = "gs://"
HANDLE = f"{PREFIX}bucket/folder"
_HANDLE = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/[\w.=-]+)*/?", re.ASCII)


def fetch(handle: str, weights: bool) -> Path:
    """The local copy of a preset's folder in a bucket, made of what is not there yet.

    It lies in the `models` folder of KERAS_HOME, or of ~/.keras, and is not compared with the bucket again.

    Args:
        handle: `bucket/folder`.
        weights: whether to fetch the weights; without, only what is small: configuration, tokenizer, index.

    Raises:
        PresetError: if TensorFlow is not in use, there is no such preset, it may not be read, or does not come whole.
        CheckpointError: if its configuration or index is broken.
    """
    if not _HANDLE.fullmatch(handle) or any(part in (".", "..") for part in handle.split("/")) or len(handle) > 1000:
        raise PresetError(f"{handle[:100]!r} is no folder of Google Cloud Storage: give {HANDLE}.")
    folder = _cache_folder() / handle.rstrip("/")
    if was_fetched(folder, weights):
        return folder
    what = f"{PREFIX}{handle.rstrip('/')}"
    with alone_in(folder):
        if was_fetched(folder, weights):
            return folder
        try:
            files = _file_system()
            return fetch_by_name(lambda name: _copy(files, f"{what}/{name}", folder / name), what, weights)
        except (CheckpointError, PresetError):
            raise
        except Exception as error:
            raise _explain(error, what) from error


def _cache_folder() -> Path:
    home = os.environ.get("KERAS_HOME") or Path.home() / ".keras"
    # Not where KerasHub keeps its own: what it leaves when a copy breaks looks whole.
    return Path(home, "models", "gemma2_keras", "gs")


def _file_system() -> Any:
    """TensorFlow's files, if TensorFlow is there already; it is not loaded for this alone."""
    if keras.backend.backend() != "tensorflow" and "tensorflow" not in sys.modules:
        raise PresetError(
            f"{PREFIX} is read through TensorFlow, which is not loaded: set KERAS_BACKEND=tensorflow or `import "
            "tensorflow` first, or copy the folder with `gcloud storage cp -r` and give its path."
        )
    import tensorflow

    return tensorflow.io.gfile


def _copy(files: Any, address: str, path: Path) -> Path | None:
    """Copy a file, unless it is there; `None` if the bucket has no such file."""
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        size = files.stat(address).length
        files.copy(address, os.fspath(beside))
        if beside.stat().st_size != size:
            raise OSError(f"{address} has {size} bytes, of which {beside.stat().st_size} came")
        beside.replace(path)
    except Exception as error:
        if type(error).__name__ == "NotFoundError":
            return None
        raise
    finally:
        beside.unlink(missing_ok=True)
    return path


def _explain(error: Exception, what: str) -> PresetError:
    reason = None
    # By name, as TensorFlow may not be imported here.
    if type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError"):
        reason = "You may not read it: log in with `gcloud auth application-default login`, or ask its owner."
    elif type(error).__name__ == "ResourceExhaustedError":
        reason = "The disk is full, or the bucket's quota is used up."
    return PresetError(did_not_come(what, "Google Cloud Storage", error, reason))
