"""Models, tokenizers and preprocessors out of preset folders, and into them.

A saved preset is a transformers checkpoint (configuration, safetensors, SentencePiece model) with one more file for
what transformers has no place for, so that the same folder loads here and there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from gemma2_keras.checkpoints.contents import LiveCheckpoint, load_into
from gemma2_keras.checkpoints.guard import read_json
from gemma2_keras.checkpoints.hub import OWN_FILE, resolve
from gemma2_keras.checkpoints.saving import replacing_folder, write_json
from gemma2_keras.checkpoints.transformers import (
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    INDEX_FILE,
    TOKENIZER_FILE,
    SafetensorsCheckpoint,
    parse_config,
    write_checkpoint,
)
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import CheckpointError
from gemma2_keras.layers.initialization import awaiting_weights

FORMAT = 1
_OWN_TYPES = {
    "tokenizer": {"parse_special": bool},
    "preprocessor": {"sequence_length": int, "add_start_token": bool, "add_end_token": bool},
}


def load_backbone(
    cls: type, preset: Any, *, load_weights: bool = True, dtype: Any = None, check_finite: bool = True
) -> Any:
    """Build `cls` for a preset and, if asked, fill it with the preset's weights."""
    folder = resolve(preset)
    settings = read_json(folder / CONFIG_FILE)
    config = parse_config(settings)
    hyperparameters = {**config.to_dict(), "dropout": _own_settings(folder).get("dropout", 0.0)}
    if not load_weights:
        return cls(**hyperparameters, dtype=_stored_dtype(settings) or "float32" if dtype is None else dtype)
    # Read and checked whole before anything is allocated.
    checkpoint = SafetensorsCheckpoint(folder, config)
    with awaiting_weights():
        backbone = cls(**hyperparameters, dtype=_stored_dtype(settings) or checkpoint.dtype if dtype is None else dtype)
    load_into(backbone, checkpoint, check_finite)
    return backbone


def inspect_checkpoint(preset: Any) -> tuple[Gemma2Config, str]:
    """The architecture of a preset, and the dtype that its weights get by default; they are checked, and not read.

    Raises:
        PresetError: if the preset leads nowhere.
        CheckpointError: if it is no whole checkpoint.
    """
    folder = resolve(preset)
    settings = read_json(folder / CONFIG_FILE)
    config = parse_config(settings)
    checkpoint = SafetensorsCheckpoint(folder, config)
    return config, _stored_dtype(settings) or checkpoint.dtype


def _stored_dtype(settings: dict[str, Any]) -> str | None:
    dtype = settings.get("dtype", settings.get("torch_dtype"))
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise CheckpointError(f"`dtype` is {dtype!r}; allowed: float32, bfloat16, float16.")
    return dtype


def load_tokenizer(cls: type, preset: Any, **kwargs: Any) -> Any:
    """Make `cls` from a preset's SentencePiece model."""
    folder = resolve(preset)
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {TOKENIZER_FILE}, the SentencePiece model of the tokenizer.")
    try:
        return cls(path, **{**_own_settings(folder).get("tokenizer", {}), **kwargs})
    except ValueError as error:
        raise CheckpointError(f"{path} is no Gemma tokenizer: {error}") from error


def load_preprocessor(cls: type, preset: Any, **kwargs: Any) -> Any:
    """Make `cls` with a preset's tokenizer and settings."""
    folder = resolve(preset)
    settings = _own_settings(folder).get("preprocessor", {})
    return cls(load_tokenizer(cls.tokenizer_cls, folder), **{**settings, **kwargs})


def has_tokenizer(preset: Any) -> bool:
    """Whether a preset comes with a tokenizer; a bare transformers checkpoint may not."""
    return (resolve(preset) / TOKENIZER_FILE).is_file()


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
    if max_shard_size is not None and not (isinstance(max_shard_size, int | float) and max_shard_size > 0):
        raise ValueError(f"`max_shard_size` must be above 0 GB, or None; given {max_shard_size!r}.")
    with replacing_folder(folder, OWN_FILE, _is_ours) as beside:
        own: dict[str, Any] = {"format": FORMAT}
        if keep and (Path(folder) / OWN_FILE).exists():
            own |= _own_settings(Path(folder))
            for path in Path(folder).iterdir():
                if _is_ours(path.name) and (backbone is None or not _is_of_model(path.name)):
                    shutil.copy(path, beside)
        if backbone is not None:
            write_checkpoint(beside, LiveCheckpoint(backbone), max_shard_size=max_shard_size)
            own["dropout"] = backbone.config.dropout
        if tokenizer is not None:
            (beside / TOKENIZER_FILE).write_bytes(tokenizer.proto)
            own["tokenizer"] = {key: getattr(tokenizer, key) for key in _OWN_TYPES["tokenizer"]}
            stop_ids = list(tokenizer.stop_token_ids)
            special = {"bos_token_id": tokenizer.start_token_id, "pad_token_id": tokenizer.pad_token_id}
            write_json(beside / GENERATION_CONFIG_FILE, {**special, "eos_token_id": stop_ids})
        if preprocessor is not None:
            own["preprocessor"] = {key: getattr(preprocessor, key) for key in _OWN_TYPES["preprocessor"]}
        write_json(beside / OWN_FILE, own)


def _is_ours(name: str) -> bool:
    return _is_of_model(name) or name in (OWN_FILE, TOKENIZER_FILE, GENERATION_CONFIG_FILE)


def _is_of_model(name: str) -> bool:
    return name in (CONFIG_FILE, INDEX_FILE) or (name.startswith("model") and name.endswith(".safetensors"))


def _own_settings(folder: Path) -> dict[str, Any]:
    """Our own file of a preset folder, checked; empty for a folder that we did not write."""
    path = folder / OWN_FILE
    if not path.exists():
        return {}
    own = read_json(path)
    if own.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {own.get('format')!r}; this version reads {FORMAT}. Install a newer gemma2-keras."
        )
    for part, types in _OWN_TYPES.items():
        value = own.get(part, {})
        if not isinstance(value, dict) or not set(value) <= set(types):
            raise CheckpointError(
                f"`{part}` in {path} must be an object with keys among {sorted(types)}; it is {value!r}."
            )
        for key, setting in value.items():
            if type(setting) is not types[key]:
                raise CheckpointError(f"`{key}` in {path} must be of type {types[key].__name__}; it is {setting!r}.")
    dropout = own.get("dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise CheckpointError(f"`dropout` in {path} must be at least 0 and below 1; it is {dropout!r}.")
    unknown = set(own) - {"format", "dropout", *_OWN_TYPES}
    if unknown:
        raise CheckpointError(f"{path} has unknown keys: {sorted(unknown)}.")
    return own
