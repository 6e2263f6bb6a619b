"""What the sources of presets share: the files that make one, and what is said when they do not come."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from gemma2_keras.checkpoints.guard import file_inside, read_json, some
from gemma2_keras.checkpoints.own_file import OWN_FILE
from gemma2_keras.checkpoints.saving import lock
from gemma2_keras.checkpoints.tokenizer_json import TOKENIZER_JSON_FILE
from gemma2_keras.checkpoints.transformers import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
)
from gemma2_keras.errors import CheckpointError, PresetError

WITHOUT_DOWNLOAD = '"gemma2_tiny_en" works without any download.'
# Which files were fetched by name, once all there are have come; sources that list no files cannot tell otherwise.
_RECORD = ".gemma2_keras.fetched.json"


@dataclasses.dataclass(frozen=True)
class Layout:
    """The files of a preset beside its `config.json`.

    Attributes:
        tokenizers: files that hold the tokenizer, each by itself.
        others: what else is no weights. A preset may lack these, and the tokenizer.
        index: names the files of weights, if they are several; no weights itself.
        weights: the file of weights, if it is one.
    """

    tokenizers: tuple[str, ...]
    others: tuple[str, ...]
    index: str
    weights: str

    @property
    def settings(self) -> tuple[str, ...]:
        """All that is no weights, the index included."""
        return (*self.tokenizers, *self.others, self.index)


TRANSFORMERS = Layout(
    (TOKENIZER_FILE, TOKENIZER_JSON_FILE),
    (OWN_FILE, GENERATION_CONFIG_FILE),
    INDEX_FILE,
    WEIGHTS_FILE,
)
KERAS_HUB = Layout(
    ("assets/tokenizer/vocabulary.spm",),
    ("tokenizer.json", "preprocessor.json", "task.json", "metadata.json"),
    "model.weights.json",
    "model.weights.h5",
)
# Everything that may be wanted before the layout is known.
SETTINGS = tuple(dict.fromkeys((CONFIG_FILE, *TRANSFORMERS.settings, *KERAS_HUB.settings)))


def layout_of(folder: Path) -> Layout:
    """The layout that a folder's `config.json` belongs to.

    Raises:
        CheckpointError: if the file is missing or broken.
    """
    return KERAS_HUB if "class_name" in read_json(folder / CONFIG_FILE) else TRANSFORMERS


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder with a configuration has a file of its tokenizer."""
    return any((folder / name).is_file() for name in layout_of(folder).tokenizers)


def weight_files(folder: Path) -> list[str]:
    """The files of weights that belong into a folder, by its configuration and, if there is one, its index.

    Raises:
        CheckpointError: if one of these is broken, or names a file outside the folder.
    """
    layout = layout_of(folder)
    index = folder / layout.index
    if not index.exists():
        return [layout.weights]
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not file_of:
        raise CheckpointError(f"{index} has no `weight_map`.")
    # Keras lists several files for what it had to cut.
    files = [file for value in file_of.values() for file in (value if isinstance(value, list) else [value])]
    return sorted({file_inside(folder, file).name for file in files})


def has_all(folder: Path, weights: bool) -> bool:
    """Whether a folder has its configuration and, if asked for, every file of weights."""
    if not (folder / CONFIG_FILE).is_file():
        return False
    return not weights or all((folder / name).is_file() for name in weight_files(folder))


def fetch_by_name(get: Callable[[str], Path | None], what: str, weights: bool) -> Path:
    """Fetch a preset from a source that does not say which files it has, and record in its folder what came.

    Args:
        get: fetches one file of the preset by name, and gives its path, or `None` if there is no such file.
        what: the preset, for error messages.
        weights: whether to fetch the weights, too.

    Returns:
        The folder.

    Raises:
        PresetError: if there is no `config.json`, or a file of weights is missing.
        CheckpointError: if the configuration or the index is broken.
    """
    config = get(CONFIG_FILE)
    if config is None:
        raise PresetError(f"{what} has no {CONFIG_FILE}, or there is no such preset. Check the handle.")
    folder = config.parent
    if was_fetched(folder, weights):
        return folder
    layout = layout_of(folder)
    names = [CONFIG_FILE, *(name for name in layout.settings if get(name) is not None)]
    if weights:
        needed = weight_files(folder)
        missing = [name for name in needed if get(name) is None]
        if missing:
            raise PresetError(lacks_weights(what, missing))
        names += needed
    temporary = folder / f"{_RECORD}.{uuid.uuid4().hex[:8]}"
    # A folder that is mounted for reading needs no record: nothing of it is fetched.
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps({"files": names, "weights": weights}), encoding="utf-8")
        temporary.replace(folder / _RECORD)
    return folder


def was_fetched(folder: Path, weights: bool) -> bool:
    """Whether `fetch_by_name` went through here before, and what it fetched is still there."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return (record["weights"] or not weights) and all((folder / name).is_file() for name in record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time fetch into a folder, which is made if need be; others wait.

    File systems without locks, folders that may only be read, and Windows keep nobody out.
    """
    descriptor = None
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        lock(descriptor)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def lacks_weights(what: str, missing: list[str]) -> str:
    """The message for a preset whose weights are not there, or in a format that is not read."""
    return (
        f"{what} lacks {some(missing)}: weights are read from safetensors files in the layout of transformers, and "
        "from those of KerasHub. Other formats, among them pickles, are not fetched."
    )


def is_gated(what: str, page: str, token: str) -> str:
    """The message for a preset that may not be read before its licence is accepted, or without a token.

    Args:
        what: the preset.
        page: address where the licence is accepted.
        token: a clause that says how to give the token.
    """
    return f"{what} is gated: accept its terms at {page}, then {token}. Meanwhile {WITHOUT_DOWNLOAD}"


def did_not_come(what: str, source: str, error: BaseException, reason: str | None = None) -> str:
    """The message for a download that failed.

    Args:
        what: the preset.
        source: where it should come from.
        error: what was raised.
        reason: what it means and what to do, in sentences, if that is known.
    """
    numbers = {cause.errno for cause in causes(error) if isinstance(cause, OSError)}
    if numbers & {errno.ENOSPC, errno.EDQUOT}:
        reason = "The disk is full. Make room and ask again; files that came whole are kept."
    elif numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        reason = "The cache cannot be written to: point HF_HOME, KAGGLEHUB_CACHE or KERAS_HOME to another folder."
    if reason is None:
        reason = f"Check the connection, or give a folder with the checkpoint; {WITHOUT_DOWNLOAD}"
    return f"{what} could not be fetched from {source} ({type(error).__name__}). {reason}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it came from, and so on."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
