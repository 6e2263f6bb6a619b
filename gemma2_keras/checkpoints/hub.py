"""A preset's name, handle or folder to a folder on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gemma2_keras.checkpoints.catalogue import Preset, describe_preset, list_presets
from gemma2_keras.checkpoints.gguf.container import is_gguf
from gemma2_keras.checkpoints.own_file import OWN_FILE
from gemma2_keras.checkpoints.saving import restore_folder
from gemma2_keras.checkpoints.sources import google_storage, hugging_face, kaggle
from gemma2_keras.checkpoints.transformers import CONFIG_FILE
from gemma2_keras.errors import PresetError

_SOURCES = (hugging_face, kaggle, google_storage)
_HANDLES = ", ".join(source.HANDLE for source in _SOURCES)
_GGUF = ".gguf"
_OWNED = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")


def resolve(preset: str | os.PathLike, weights: bool = True) -> Path:
    """The folder of a preset, fetched first if it is not on this machine.

    A name of the catalogue is looked for in the caches of all its sources; what is in none comes from Hugging Face, or
    from Kaggle where credentials for that alone are known. A handle is asked for where it says, and where that is not
    reached, what the cache has of it serves.

    Args:
        preset: a name of the catalogue; a handle `hf://owner/name`, `hf://owner/name@revision`,
            `kaggle://owner/model/keras/variation/version`, with or without the version, or `gs://bucket/folder`; a
            folder with a `config.json`; or a `.gguf` file.
        weights: whether the weights are fetched. Without them little is, so that a tokenizer or an architecture costs
            no large download; asking again with them fetches the rest into the same folder.

    Returns:
        The folder; for a `.gguf` file, the file.

    Raises:
        PresetError: says why it leads nowhere, and what would.
        CheckpointError: if a configuration or an index that was fetched is broken.

    >>> resolve("gemma2_tiny_en").name
    'gemma2_tiny_en'
    """
    if not isinstance(preset, str | os.PathLike):
        raise PresetError(f"`preset` must be a name, a handle or a folder; given {type(preset).__name__}.")
    text = os.fspath(preset)
    if not text.strip():
        raise PresetError(
            f"`preset` is empty: give a name of `gemma2_keras.list_presets()`, a handle ({_HANDLES}), or a folder; "
            'the current one is ".".'
        )
    for source in _SOURCES:
        if text.startswith(source.PREFIX):
            return source.fetch(text.removeprefix(source.PREFIX), weights)
    if "://" in text:
        raise PresetError(f"Handle {text[:100]!r} is of a kind that is not read; allowed: {_HANDLES}.")
    if text in list_presets():
        entry = describe_preset(text)
        entry.require_text_model()
        return _of_catalogue(entry, weights)
    return _local(text)


def _of_catalogue(entry: Preset, weights: bool) -> Path:
    """What is on this machine already, from whichever source; else from the one that the user has an account with."""
    if entry.folder is not None:
        return entry.folder
    on_kaggle = None if entry.kaggle is None else entry.kaggle.removeprefix(kaggle.PREFIX)
    revision = entry.hugging_face_revision
    on_hugging_face = entry.hugging_face if revision is None else f"{entry.hugging_face}@{revision}"
    if on_hugging_face is not None and (folder := hugging_face.cached(on_hugging_face, weights)) is not None:
        return folder
    if on_kaggle is not None and (folder := kaggle.cached(on_kaggle, weights)) is not None:
        return folder
    if on_kaggle is not None and (
        on_hugging_face is None or (not hugging_face.has_token() and kaggle.has_credentials())
    ):
        return kaggle.fetch(on_kaggle, weights)
    if on_hugging_face is None:
        raise PresetError(
            f"The weights of {entry.name} are missing from this installation: install gemma2-keras again."
        )
    return hugging_face.fetch(on_hugging_face, weights)


def _local(text: str) -> Path:
    path = Path(os.path.expanduser(text))
    if len(text) > 4096 or "\0" in text:
        raise PresetError(f"{text[:40]!r}… leads to no preset: it is {len(text)} characters long, or holds a NUL.")
    try:
        restore_folder(path)
    except OSError as error:
        raise PresetError(
            f"A save to {path} was killed before its end, and what it left cannot be renamed ({error}): save again."
        ) from error
    if path.is_dir():
        if not any((path / name).is_file() for name in (CONFIG_FILE, OWN_FILE)):
            raise PresetError(f"The folder {path} has no {CONFIG_FILE}: it is no preset and no checkpoint.")
        return path
    if path.suffix.lower() == _GGUF:
        if not path.is_file():
            raise PresetError(f"There is no file {path}.")
        return path
    if path.is_file() and is_gguf(path):
        return path
    if path.exists():
        raise PresetError(f"{path} is a file; give the folder that holds it.")
    if os.sep in text or text.startswith("."):
        handle = (
            f" A repository of Hugging Face is called {hugging_face.PREFIX}{text}." if _OWNED.fullmatch(text) else ""
        )
        raise PresetError(f"There is no folder {path}.{handle}")
    describe_preset(text)
    raise AssertionError("unreachable: an unknown name was refused")
