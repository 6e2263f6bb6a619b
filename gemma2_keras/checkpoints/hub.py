"""A preset's name, handle or folder to a folder on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from gemma2_keras.checkpoints.catalogue import describe_preset, list_presets
from gemma2_keras.checkpoints.saving import restore_folder
from gemma2_keras.checkpoints.transformers import CONFIG_FILE
from gemma2_keras.errors import PresetError

HUGGING_FACE = "hf://"
# In a folder that we saved, for what transformers has no place for.
OWN_FILE = "gemma2_keras.json"
# What a checkpoint needs, and nothing that a repository may hold beside it.
_WANTED = ("config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.model")


def resolve(preset: str | os.PathLike) -> Path:
    """The folder of a preset, fetched first if it is not on this machine.

    Args:
        preset: a name of the catalogue, a handle `hf://owner/name`, or a folder with a `config.json`.

    Raises:
        PresetError: says why it leads nowhere, and what would.
    """
    if not isinstance(preset, str | os.PathLike):
        raise PresetError(f"`preset` must be a name, a handle or a folder; given {type(preset).__name__}.")
    text = os.fspath(preset)
    if not text.strip():
        raise PresetError(
            f"`preset` is empty: give a name of `gemma2_keras.list_presets()`, a handle {HUGGING_FACE}owner/name, or a "
            'folder; the current one is ".".'
        )
    if text.startswith(HUGGING_FACE):
        return _fetch(text.removeprefix(HUGGING_FACE))
    if "://" in text:
        raise PresetError(f"Handle {text!r} is of a kind that is not read; allowed: {HUGGING_FACE}owner/name.")
    if text in list_presets():
        entry = describe_preset(text)
        if entry.folder is not None:
            return entry.folder
        if entry.hugging_face is None:
            raise PresetError(f"The weights of {text} are missing from this installation: install gemma2-keras again.")
        return _fetch(entry.hugging_face)
    folder = Path(text)
    if len(text) > 4096 or "\0" in text:
        raise PresetError(f"{text[:40]!r}… leads to no preset: it is {len(text)} characters long, or holds a NUL.")
    try:
        restore_folder(folder)
    except OSError as error:
        raise PresetError(
            f"A save to {folder} was killed before its end, and what it left cannot be renamed ({error}): save again."
        ) from error
    if folder.is_dir():
        if not any((folder / name).is_file() for name in (CONFIG_FILE, OWN_FILE)):
            raise PresetError(f"The folder {folder} has no {CONFIG_FILE}: it is no preset and no checkpoint.")
        return folder
    if folder.exists():
        raise PresetError(f"{folder} is a file; give the folder that holds it.")
    if os.sep in text or text.startswith("."):
        raise PresetError(f"There is no folder {folder}.")
    describe_preset(text)
    raise AssertionError("unreachable: an unknown name was refused")


def _fetch(repository: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(_WANTED)))
    except errors.GatedRepoError as error:
        raise PresetError(
            f"{repository} is gated: accept its terms on its Hugging Face page, then set HF_TOKEN or run "
            '`hf auth login`. Meanwhile "gemma2_tiny_en" works without any download.'
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise PresetError(f"Hugging Face has no model {repository!r} that you may read. Check the handle.") from error
    except Exception as error:
        # Errors of the HTTP library come through as they are, and the library changes with the version.
        raise PresetError(
            f"{repository} could not be fetched from Hugging Face ({type(error).__name__}). Check the connection, or "
            'give a folder with the checkpoint; "gemma2_tiny_en" works without any download.'
        ) from error
