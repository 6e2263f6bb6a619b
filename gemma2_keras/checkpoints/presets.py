"""Models, tokenizers and preprocessors out of presets, and into preset folders."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gemma2_keras.checkpoints.adapters import CONFIG_FILE as ADAPTER_CONFIG_FILE
from gemma2_keras.checkpoints.adapters import WEIGHTS_FILE as ADAPTER_WEIGHTS_FILE
from gemma2_keras.checkpoints.catalogue import describe_preset, list_presets
from gemma2_keras.checkpoints.contents import Checkpoint, LiveCheckpoint, WatchedCheckpoint, load_into
from gemma2_keras.checkpoints.fitting import require_fit
from gemma2_keras.checkpoints.hub import resolve
from gemma2_keras.checkpoints.own_file import (
    FORMAT,
    HAS_ADAPTER,
    OWN_FILE,
    PREPROCESSOR_SETTINGS,
    TOKENIZER_SETTINGS,
    own_settings,
)
from gemma2_keras.checkpoints.saving import replacing_folder, write_json
from gemma2_keras.checkpoints.stored import Stored, open_stored
from gemma2_keras.checkpoints.tokenizer_files import TOKENIZER_CONFIG_FILE, TOKENIZER_JSON_FILE, write_tokenizer
from gemma2_keras.checkpoints.transformers import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    TOKENIZER_FILE,
    write_checkpoint,
)
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import CheckpointError
from gemma2_keras.layers.initialization import awaiting_weights

_WEIGHTS = re.compile(r"model(-[0-9]{5}-of-[0-9]{5})?\.safetensors")
_TOKENIZER = (TOKENIZER_FILE, TOKENIZER_JSON_FILE, TOKENIZER_CONFIG_FILE)
# Within an exported folder, an adapter that is not merged: the folder, and the files in it.
ADAPTER_FOLDER = "adapter"
_ADAPTER = {f"{ADAPTER_FOLDER}/{name}" for name in ("", ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE)}
# How often a preset is opened anew that is replaced meanwhile.
_TRIES = 5


def load_backbone(
    cls: type, preset: Any, *, load_weights: bool = True, dtype: Any = None, check_finite: bool = True
) -> Any:
    """Build `cls` for a preset and, if asked, fill it with the preset's weights."""
    require_room(preset, dtype)
    stored = open_stored(resolve(preset, weights=False))
    name = preset if preset in list_presets() else None
    kept = stored.dtype() if name is None else describe_preset(name).dtype
    dtype = kept if dtype is None else dtype
    if "://" in str(preset) and dtype is not None:
        # Before the weights are downloaded.
        require_fit(stored.config(), dtype)
    if not load_weights:
        return cls(**stored.config().to_dict(), dtype="float32" if dtype is None else dtype)
    # Read and checked whole before anything is allocated.
    _, config, checkpoint = opened(preset)
    dtype = checkpoint.dtype if dtype is None else dtype
    if name is None:
        require_fit(config, dtype)
    with WatchedCheckpoint(checkpoint, "Loading", check_finite) as watched:
        watched.look_ahead()
        with awaiting_weights():
            backbone = cls(**config.to_dict(), dtype=dtype)
        load_into(backbone, watched)
    return backbone


def opened(preset: Any) -> tuple[Stored, Gemma2Config, Checkpoint]:
    """A preset with its architecture and its weights, checked and not read: those of one save, whoever saves meanwhile.

    Raises:
        PresetError: if it leads nowhere.
        CheckpointError: if it is no whole checkpoint, or is replaced again and again.
    """
    for _ in range(_TRIES):
        path = resolve(preset)
        before = _identity(path)
        stored = open_stored(path)
        try:
            found = stored, stored.config(), stored.checkpoint()
        except CheckpointError:
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return found
    raise CheckpointError(f"{path} was replaced {_TRIES} times while it was read. Load it when nobody saves to it.")


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a folder from another that has taken its place."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def require_room(preset: Any, dtype: Any = None) -> None:
    """See to it, before anything of a preset known by name is fetched, that memory can hold it.

    Raises:
        WontFit: if it cannot.
        PresetError: if it is no text model.
    """
    if isinstance(preset, str) and preset in list_presets():
        entry = describe_preset(preset)
        entry.require_text_model()
        require_fit(entry.architecture, entry.dtype if dtype is None else dtype, preset)


def inspect_checkpoint(preset: Any) -> tuple[Gemma2Config, str]:
    """The architecture of a preset, and the dtype that its weights get by default; they are checked, and not read.

    Raises:
        PresetError: if the preset leads nowhere.
        CheckpointError: if it is no whole checkpoint.
    """
    stored, config, checkpoint = opened(preset)
    return config, stored.dtype() or checkpoint.dtype


def load_tokenizer(cls: type, preset: Any, **kwargs: Any) -> Any:
    """Make `cls` from a preset's SentencePiece model."""
    folder = resolve(preset, weights=False)
    stored = open_stored(folder)
    proto = stored.proto()
    if proto is None:
        raise CheckpointError(f"{folder} has no tokenizer: neither {TOKENIZER_FILE} nor {TOKENIZER_JSON_FILE}.")
    try:
        return cls(proto, **{**stored.settings("tokenizer"), **kwargs})
    except ValueError as error:
        raise CheckpointError(f"{folder} has no Gemma tokenizer: {error}") from error


def load_preprocessor(cls: type, preset: Any, **kwargs: Any) -> Any:
    """Make `cls` with a preset's tokenizer and settings."""
    folder = resolve(preset, weights=False)
    settings = open_stored(folder).settings("preprocessor")
    tokenizer = load_tokenizer(cls.tokenizer_cls, folder)
    try:
        return cls(tokenizer, **{**settings, **kwargs})
    except ValueError as error:
        if kwargs:
            raise
        raise CheckpointError(f"{folder} describes no preprocessor: {error}") from error


def has_tokenizer(preset: Any) -> bool:
    """Whether a preset comes with a tokenizer; a bare transformers checkpoint may not."""
    return open_stored(resolve(preset, weights=False)).has_tokenizer()


def save_preset(
    folder: str | os.PathLike,
    *,
    backbone: Any = None,
    tokenizer: Any = None,
    preprocessor: Any = None,
    max_shard_size: float | None = 10,
    keep: bool = False,
) -> None:
    """Write a preset folder that `from_preset` and transformers read; adapters are merged into the weights.

    Args:
        folder: where; an earlier saved preset there is replaced, and stays as it was if writing fails.
        backbone: a `Gemma2Backbone`, or `None`.
        tokenizer: a `Gemma2Tokenizer`, or `None`.
        preprocessor: a `Gemma2CausalLMPreprocessor` of that tokenizer, or `None`.
        max_shard_size: most GB in one file of weights; `None` for a single file.
        keep: whether the parts that are `None` stay as an earlier preset at `folder` has them.

    Raises:
        FileExistsError: if something else than a saved preset stands at `folder`.
        ValueError: if `max_shard_size` is not above 0.
    """
    check_shard_size(max_shard_size)
    with replacing_folder(folder, OWN_FILE, ours_in(folder)) as beside:
        own: dict[str, Any] = {"format": FORMAT}
        if keep and (Path(folder) / OWN_FILE).exists():
            own |= {key: value for key, value in own_settings(Path(folder)).items() if key != HAS_ADAPTER}
            for path in Path(folder).iterdir():
                anew = (backbone is not None and _is_of_model(path.name)) or (
                    tokenizer is not None and path.name in _TOKENIZER
                )
                if is_ours(path.name) and not anew:
                    shutil.copy(path, beside)
        if backbone is not None:
            own |= write_model(beside, LiveCheckpoint(backbone), max_shard_size)
        if tokenizer is not None:
            # A vocabulary of another kind than Gemma's has `tokenizer.model` alone.
            with contextlib.suppress(ValueError):
                write_tokenizer(beside, tokenizer)
            own |= write_settings(beside, tokenizer, preprocessor)
        write_json(beside / OWN_FILE, own)


def write_model(folder: Path, checkpoint: Checkpoint, max_shard_size: float | None) -> dict[str, Any]:
    """Write configuration and weights into a folder; gives what our own file has to say of them."""
    write_checkpoint(folder, checkpoint, max_shard_size)
    return {"dropout": checkpoint.config.dropout}


def write_settings(folder: Path, tokenizer: Any, preprocessor: Any) -> dict[str, Any]:
    """Write how generation ends into a folder; gives what our own file has to say of tokenizer and preprocessor."""
    special = {"bos_token_id": tokenizer.start_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_json(folder / GENERATION_CONFIG_FILE, {**special, "eos_token_id": list(tokenizer.stop_token_ids)})
    own = {"tokenizer": {key: getattr(tokenizer, key) for key in TOKENIZER_SETTINGS}}
    if preprocessor is not None:
        own["preprocessor"] = {key: getattr(preprocessor, key) for key in PREPROCESSOR_SETTINGS}
    return own


def check_shard_size(max_shard_size: Any) -> None:
    """Refuse what is no number of GB above 0, nor `None`."""
    if max_shard_size is not None and not (isinstance(max_shard_size, int | float) and max_shard_size > 0):
        raise ValueError(f"`max_shard_size` must be above 0 GB, or None; given {max_shard_size!r}.")


def ours_in(folder: str | os.PathLike) -> Callable[[str], bool]:
    """Tells of names in a preset folder whether they are of what we have written there, for `replacing_folder`."""
    try:
        adapter = own_settings(Path(os.path.expanduser(folder))).get(HAS_ADAPTER, False)
    except (CheckpointError, TypeError):
        # What is no path is refused where it is written to.
        adapter = False
    return lambda name: is_ours(name) or (adapter and name in _ADAPTER)


def is_ours(name: str) -> bool:
    """Whether a file of this name in a preset folder is one that we write."""
    return _is_of_model(name) or name in (OWN_FILE, GENERATION_CONFIG_FILE, *_TOKENIZER)


def _is_of_model(name: str) -> bool:
    return name in (CONFIG_FILE, INDEX_FILE) or _WEIGHTS.fullmatch(name) is not None
