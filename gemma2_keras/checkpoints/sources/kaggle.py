"""Presets from Kaggle, through `kagglehub`: its cache and its credentials."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gemma2_keras.checkpoints.sources.fetching import (
    WITHOUT_DOWNLOAD,
    alone_in,
    causes,
    did_not_come,
    fetch_by_name,
    has_all,
    is_gated,
    layout_of,
    was_fetched,
    weight_files,
)
from gemma2_keras.checkpoints.transformers import CONFIG_FILE
from gemma2_keras.errors import CheckpointError, PresetError

PREFIX = "kaggle://"
HANDLE = f"{PREFIX}owner/model/keras/variation[/version]"
_HANDLE = re.compile(
    r"(?P<model>[\w-]+/[\w-]+)/(keras|transformers)/[\w.-]*\w(/(?P<version>[1-9][0-9]{0,8}))?", re.ASCII
)


def fetch(handle: str, weights: bool) -> Path:
    """The folder of a model's variation in the cache, with what is not there fetched.

    Processes that ask for the same one wait for each other; the library alone would mix their files.

    Args:
        handle: `owner/model/keras/variation`, or `transformers` for `keras`, with a version or for the newest.
        weights: whether to fetch the weights; without, only what is small: configuration, tokenizer, index.

    Raises:
        PresetError: if there is no such model, it may not be read, or does not come whole.
        CheckpointError: if its configuration or index is broken.
    """
    model, version = _parse(handle)
    if version is not None and (folder := cached(handle, weights)) is not None:
        return folder
    with alone_in(_cache_folder(handle if version is None else handle.rpartition("/")[0])):
        try:
            # Another process may have fetched it meanwhile.
            if version is not None and (folder := cached(handle, weights)) is not None:
                return folder
            return _fetch(handle, weights)
        except (CheckpointError, PresetError):
            raise
        except Exception as error:
            if _is_unreachable(error) and (folder := _usable(handle, weights)) is not None:
                return folder
            raise _explain(error, handle, model) from error


def cached(handle: str, weights: bool) -> Path | None:
    """The folder of a variation if all that `fetch` would give lies in the cache; nothing is asked of the network."""
    for folder in _version_folders(handle):
        if was_fetched(folder, weights) or (_bundle_marker(folder).exists() and has_all(folder, weights)):
            return folder
    return None


def has_credentials() -> bool:
    """Whether Kaggle would know the user: by variables, by a file in ~/.kaggle, or inside its notebooks."""
    from kagglehub.config import get_kaggle_credentials

    try:
        return "KAGGLE_KERNEL_RUN_TYPE" in os.environ or get_kaggle_credentials() is not None
    except ValueError:
        # A broken file shows that there is an account; the error comes when it is used.
        return True


def _parse(handle: str) -> tuple[str, str | None]:
    found = _HANDLE.fullmatch(handle)
    if found is None or len(handle) > 400:
        raise PresetError(f"{handle[:100]!r} is no model of Kaggle that is read: give {HANDLE}.")
    return found["model"], found["version"]


def _cache_folder(handle: str) -> Path:
    from kagglehub.config import get_cache_folder

    return Path(get_cache_folder(), "models", *handle.split("/"))


def _version_folders(handle: str) -> list[Path]:
    """Folders of the cache that may hold the variation, newest version first."""
    if _parse(handle)[1] is not None:
        return [_cache_folder(handle)]
    versions = [path for path in _cache_folder(handle).glob("[1-9]*") if path.name.isdecimal()]
    return sorted(versions, key=lambda path: -int(path.name))


def _bundle_marker(folder: Path) -> Path:
    """What the library leaves when it has fetched a whole version."""
    return folder.with_name(f"{folder.name}.complete")


def _holds(folder: Path, name: str) -> bool:
    """Whether the library has fetched a file and come to its end."""
    marker = folder.parent / ".complete" / folder.name / f"{name}.complete"
    return (folder / name).is_file() and (marker.exists() or _bundle_marker(folder).exists())


def _usable(handle: str, weights: bool) -> Path | None:
    """A folder of the cache that another program has filled so far that a model can be loaded from it."""
    if (folder := cached(handle, weights)) is not None:
        return folder
    for folder in _version_folders(handle):
        if _holds(folder, CONFIG_FILE):
            tokenizer = any(_holds(folder, name) for name in layout_of(folder).tokenizers)
            if tokenizer and all(_holds(folder, name) for name in (weight_files(folder) if weights else [])):
                return folder
    return None


def _fetch(handle: str, weights: bool) -> Path:
    import kagglehub

    pinned = handle

    def get(name: str) -> Path | None:
        nonlocal pinned
        if _parse(pinned)[1] is not None and _holds(_cache_folder(pinned), name):
            return _cache_folder(pinned) / name
        try:
            path = Path(kagglehub.model_download(pinned, name))
        except Exception as error:
            if _is_missing(error):
                return None
            raise
        # All files of one version, whatever is published meanwhile.
        if _parse(pinned)[1] is None and path.parent.name.isdecimal():
            pinned = f"{handle}/{path.parent.name}"
        return path

    return fetch_by_name(get, handle, weights)


def _status(error: BaseException) -> int | None:
    for cause in causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status
    return None


def _is_missing(error: Exception) -> bool:
    # The second is what it says where the files are mounted.
    return _status(error) == 404 or (isinstance(error, ValueError) and "is not present in the model" in str(error))


def _is_unreachable(error: Exception) -> bool:
    import requests

    return isinstance(error, requests.ConnectionError | requests.Timeout) or (_status(error) or 0) >= 500


def _explain(error: Exception, handle: str, model: str) -> PresetError:
    import requests
    from kagglehub import exceptions

    if _status(error) in (401, 403) or isinstance(error, exceptions.UnauthenticatedError | exceptions.CredentialError):
        page = f"https://www.kaggle.com/models/{model}"
        token = "set KAGGLE_API_TOKEN or put the kaggle.json of your account's settings into ~/.kaggle"
        return PresetError(is_gated(handle, page, token))
    reason = None
    if isinstance(error, exceptions.DataCorruptionError):
        reason = (
            "A file came with another content than announced: its MD5 differs. It was removed; ask again, and if that "
            "repeats, look for a proxy that changes files."
        )
    elif isinstance(error, requests.exceptions.ChunkedEncodingError):
        reason = "The connection broke off in a file. Ask again: it goes on where it was."
    elif isinstance(error, requests.ConnectionError | requests.Timeout):
        reason = (
            "Kaggle was not reached, and not all of it is in the cache: check the connection, or give a folder with "
            f"the preset; {WITHOUT_DOWNLOAD}"
        )
    elif isinstance(error, ValueError) and "credentials" in str(error):
        reason = "The file with your credentials, kaggle.json, is broken: get it anew from your account's settings."
    elif (status := _status(error)) is not None:
        reason = f"The server answered with status {status}: try again later, or give a folder with the preset."
    return PresetError(did_not_come(handle, "Kaggle", error, reason))
