"""Presets from Hugging Face, through `huggingface_hub`: its cache, tokens and offline mode."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from pathlib import Path

from gemma2_keras.checkpoints.sources.fetching import (
    OWN_FILE,
    SETTINGS,
    causes,
    did_not_come,
    has_all,
    has_tokenizer,
    is_gated,
    lacks_weights,
    weight_files,
)
from gemma2_keras.checkpoints.transformers import CONFIG_FILE
from gemma2_keras.errors import CheckpointError, PresetError

PREFIX = "hf://"
HANDLE = f"{PREFIX}owner/name[@revision]"
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_COMMIT, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")


def fetch(handle: str, weights: bool) -> Path:
    """The folder of a repository in the cache, with what is not there fetched.

    Args:
        handle: `owner/name` or `owner/name@revision`; a revision is a branch, a tag or a commit.
        weights: whether to fetch the weights; without, only what is small: configuration, tokenizer, index.

    Raises:
        PresetError: if the repository or revision does not exist, may not be read, or does not come whole.
        CheckpointError: if its configuration or index is broken.
    """
    repository, revision = _parse(handle)
    try:
        folder = _obtain(repository, revision, SETTINGS)
        if not (folder / CONFIG_FILE).is_file() and not (folder / OWN_FILE).is_file():
            raise PresetError(f"{repository} has no {CONFIG_FILE}: it is no preset and no checkpoint.")
        if weights and (folder / CONFIG_FILE).is_file():
            needed = weight_files(folder)
            if not all((folder / name).is_file() for name in needed):
                # Of the commit that the configuration is of, whatever was pushed since.
                folder = _obtain(repository, folder.name, needed)
            if missing := [name for name in needed if not (folder / name).is_file()]:
                raise PresetError(lacks_weights(repository, missing))
        return folder
    except (CheckpointError, PresetError):
        raise
    except Exception as error:
        raise _explain(error, repository, revision) from error


def cached(handle: str, weights: bool) -> Path | None:
    """The folder of a repository if configuration, tokenizer and, if wanted, weights are in the cache; asks nobody."""
    repository, revision = _parse(handle)
    folder = _held(repository, revision, SETTINGS)
    if folder is None or not has_all(folder, weights) or not has_tokenizer(folder):
        return None
    return folder


def has_token() -> bool:
    """Whether a token is known, from HF_TOKEN or a login."""
    import huggingface_hub

    return huggingface_hub.get_token() is not None


def _parse(handle: str) -> tuple[str, str | None]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repository, _, revision = handle.partition("@")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise _unknown(repository) from error
    if revision == "" and "@" not in handle:
        return repository, None
    # It becomes part of an address and of a path in the cache.
    if not _REVISION.fullmatch(revision) or ".." in revision or len(revision) > 200:
        raise PresetError(f"{revision[:100]!r} is no revision of {repository}: give a branch, a tag or a commit.")
    return repository, revision


def _unknown(repository: str) -> PresetError:
    return PresetError(
        f"Hugging Face has no model {repository[:100]!r} that you may read. Check the handle; for a private one set "
        "HF_TOKEN or run `hf auth login`."
    )


def _held(repository: str, revision: str | None, names: tuple[str, ...] | list[str]) -> Path | None:
    import huggingface_hub
    from huggingface_hub import errors

    patterns = [glob.escape(name) for name in names]
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=patterns, local_files_only=True
            )
        )
    except errors.LocalEntryNotFoundError:
        return None


def _obtain(repository: str, revision: str | None, names: tuple[str, ...] | list[str]) -> Path:
    """The snapshot's folder, with those of the files that the repository has; what is new in it is checked."""
    import huggingface_hub

    held = _held(repository, revision, names)
    before = set() if held is None else {name for name in names if (held / name).exists()}
    if revision is not None and _COMMIT.fullmatch(revision):
        # The library tries for half a minute to list the files of a commit; whether anybody is there it asks once. What
        # it raises then is its HTTP library's, which changes with the version.
        try:
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
        except Exception:
            if held is None:
                raise
            return held
    patterns = [glob.escape(name) for name in names]
    folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
    for name in names:
        if (folder / name).exists() and (folder != held or name not in before):
            _check(folder / name, repository)
    return folder


def _check(file: Path, repository: str) -> None:
    """Remove a file, and raise, if its content is not what its name in the cache says.

    The library compares sizes alone. A file of the cache is a link to one that is named by its hash: by SHA-256 for
    all weights and tokenizers, by another for what is small.
    """
    if not file.is_symlink():
        return
    content = file.parent / os.readlink(file)
    if not _SHA256.fullmatch(content.name):
        return
    with open(content, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != content.name:
        file.unlink(missing_ok=True)
        content.unlink(missing_ok=True)
        raise PresetError(
            f"{file.name} of {repository} came from Hugging Face with another content than it announces: its SHA-256 "
            f"is {digest}. It was removed; ask again, and if that repeats, look for a proxy that changes files."
        )


def _explain(error: Exception, repository: str, revision: str | None) -> PresetError:
    from huggingface_hub import errors

    chain = list(causes(error))
    # Errors of the HTTP library come through as they are, and the library changes with the version: by name.
    names = {type(cause).__name__ for cause in chain}
    status = next((cause.response.status_code for cause in chain if isinstance(cause, errors.HfHubHTTPError)), None)

    def among(kind: type) -> bool:
        return any(isinstance(cause, kind) for cause in chain)

    if among(errors.RevisionNotFoundError):
        return PresetError(f"{repository} on Hugging Face has no revision {revision!r}. Check the handle.")
    of_the_repository = errors.RepositoryNotFoundError, errors.DisabledRepoError
    if among(errors.GatedRepoError) or (status in (401, 403) and not any(map(among, of_the_repository))):
        page = f"https://huggingface.co/{repository}"
        return PresetError(
            is_gated(repository, page, "set HF_TOKEN to a token that may read it or run `hf auth login`")
        )
    if among(errors.RepositoryNotFoundError):
        return _unknown(repository)
    reason = None
    if among(errors.OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set, and not all of it is in the cache: unset it once, or give a folder."
    elif among(errors.RemoteEntryNotFoundError):
        reason = "A file that the repository lists is not there: try again later, or give another revision."
    elif names & {"RemoteProtocolError", "ReadError"} or "Consistency check failed" in str(error):
        reason = "The connection broke off in a file. Ask again: files that came whole are kept."
    elif status is not None:
        reason = f"The server answered with status {status}: try again later, or give a folder with the checkpoint."
    return PresetError(did_not_come(repository, "Hugging Face", error, reason))
