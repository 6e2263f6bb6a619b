"""Preset folders that KerasHub loads, of any checkpoint."""

from __future__ import annotations

import datetime
import importlib.metadata
from pathlib import Path, PurePosixPath
from typing import Any

from gemma2_keras.checkpoints.contents import Checkpoint
from gemma2_keras.checkpoints.keras_hub.settings import (
    CONFIG_FILE,
    GEMMA2_FLAGS,
    METADATA_FILE,
    PREPROCESSOR_FILE,
    SAME_NAMES,
    TASK_FILE,
    TOKENIZER_FILE,
    TOKENIZER_SETTINGS,
    VOCABULARY_FILE,
)
from gemma2_keras.checkpoints.keras_hub.weights import INDEX_FILE, WEIGHTS, write_weights
from gemma2_keras.checkpoints.saving import write_json
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import warn

# Class -> its module, as KerasHub writes it.
_MODULES = {
    "GemmaBackbone": "gemma_backbone",
    "GemmaCausalLM": "gemma_causal_lm",
    "GemmaCausalLMPreprocessor": "gemma_causal_lm_preprocessor",
    "GemmaTokenizer": "gemma_tokenizer",
}
# What KerasHub's Gemma has no hyperparameter for, or ignores.
_ROPE_BASE, _EPSILON = 10_000.0, 1e-6

_NAMES = {
    *(CONFIG_FILE, METADATA_FILE, TASK_FILE, TOKENIZER_FILE, PREPROCESSOR_FILE, INDEX_FILE, VOCABULARY_FILE),
    *(f"{parent}/" for parent in PurePosixPath(VOCABULARY_FILE).parents if parent.name),
}


def write_keras_hub(
    folder: Path,
    checkpoint: Checkpoint,
    proto: bytes | None = None,
    *,
    sequence_length: int = 1024,
    add_start_token: bool = True,
    add_end_token: bool = True,
    max_shard_size: float | None = 10,
) -> None:
    """Write a folder that `keras_hub.models.GemmaCausalLM.from_preset` loads, one tensor in memory at a time.

    Args:
        folder: an existing, empty folder.
        checkpoint: what to write.
        proto: the SentencePiece model; `None` writes no tokenizer and no preprocessor.
        sequence_length: tokens of a training example, for the preprocessor.
        add_start_token: whether the preprocessor puts `<bos>` before a text.
        add_end_token: whether it puts `<eos>` behind the text of a training example.
        max_shard_size: most GB in one file of weights; `None` for a single file. A tensor is never divided.

    Warns:
        UserWarning: if KerasHub reads the folder and computes something else, or keeps less, than is written.

    Raises:
        ValueError: if KerasHub's Gemma has no hyperparameter for what the model computes, or the shard size is not
            above 0.

    Example:

    >>> import tempfile
    >>> from gemma2_keras import Gemma2Backbone
    >>> from gemma2_keras.checkpoints.contents import LiveCheckpoint
    >>> from gemma2_keras.checkpoints.keras_hub.weights import KerasHubCheckpoint
    >>> backbone = Gemma2Backbone(64, 1, 4, 2, 24, 40, 8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_keras_hub(Path(folder), LiveCheckpoint(backbone))
    ...     KerasHubCheckpoint(Path(folder)).read("model.layers.0.mlp.down_proj.weight").shape
    (24, 40)
    """
    if max_shard_size is not None and not max_shard_size > 0:
        raise ValueError(f"`max_shard_size` must be above 0 GB, or None; given {max_shard_size!r}.")
    backbone = _describe_backbone(checkpoint.config, checkpoint.dtype)
    preprocessor = None
    if proto is not None:
        tokenizer = _object(
            "GemmaTokenizer", {**_layer("gemma_tokenizer", "int32"), **TOKENIZER_SETTINGS}, TOKENIZER_FILE
        )
        settings = {
            **_layer("gemma_causal_lm_preprocessor", "float32"),
            "tokenizer": tokenizer,
            "sequence_length": sequence_length,
            "add_start_token": add_start_token,
            "add_end_token": add_end_token,
        }
        preprocessor = _object("GemmaCausalLMPreprocessor", settings, PREPROCESSOR_FILE)
        write_json(folder / TOKENIZER_FILE, tokenizer)
        write_json(folder / PREPROCESSOR_FILE, preprocessor)
        (folder / VOCABULARY_FILE).parent.mkdir(parents=True)
        (folder / VOCABULARY_FILE).write_bytes(proto)
    write_json(folder / CONFIG_FILE, backbone)
    task = {"name": "gemma_causal_lm", "backbone": backbone, "preprocessor": preprocessor}
    write_json(folder / TASK_FILE, _object("GemmaCausalLM", task))
    metadata = {
        "keras_version": importlib.metadata.version("keras"),
        "keras_hub_version": importlib.metadata.version("keras-hub"),
        "parameter_count": checkpoint.config.parameter_count,
        "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
        "tasks": ["CausalLM"],
    }
    write_json(folder / METADATA_FILE, metadata)
    try:
        write_weights(folder, checkpoint, max_shard_size)
    except RuntimeError as error:
        # So the HDF5 library says, among others, that the disk is full.
        raise OSError(f"{folder} cannot be written: {error}") from error


def _describe_backbone(config: Gemma2Config, dtype: str) -> dict[str, Any]:
    """`config.json` for KerasHub; refuses what it cannot say, and warns of what KerasHub makes of it."""
    if config.rope_max_wavelength != _ROPE_BASE:
        raise ValueError(
            f"KerasHub's Gemma has no other `rope_max_wavelength` than {_ROPE_BASE:g}; the model's is "
            f"{config.rope_max_wavelength:g}. Save it in another format."
        )
    scalar, by_width = config.query_pre_attention_scalar, config.hidden_dim / config.num_query_heads
    by_head = scalar == config.head_dim
    if not by_head and scalar != by_width:
        raise ValueError(
            f"KerasHub's Gemma scales attention by the head size, {config.head_dim}, or by width / heads, "
            f"{by_width:g}; the model's `query_pre_attention_scalar` is {scalar:g}. Save it in another format."
        )
    if not by_head:
        warn(
            f"KerasHub scales attention by the head size, {config.head_dim}, whatever its configuration says (seen in "
            f"0.32): its logits will not be those of this model, whose `query_pre_attention_scalar` is {scalar:g}."
        )
    if config.layer_norm_epsilon != _EPSILON:
        warn(
            f"KerasHub uses `layer_norm_epsilon` {config.layer_norm_epsilon:g} in the last norm and {_EPSILON:g} in "
            "all others (seen in 0.32): its logits will not quite be those of this model."
        )
    if config.context_length != Gemma2Config.context_length:
        warn(
            "KerasHub keeps no `context_length`: who loads the folder may go beyond this model's "
            f"{config.context_length}."
        )
    settings = {
        **_layer("gemma_backbone", dtype),
        **{key: getattr(config, key) for key in SAME_NAMES},
        **dict.fromkeys(GEMMA2_FLAGS, True),
        "intermediate_dim": 2 * config.intermediate_dim,
        "query_head_dim_normalize": by_head,
    }
    return _object("GemmaBackbone", settings)


def is_of_keras_hub(name: str) -> bool:
    """Whether a name in a folder, or that of a folder in it with a slash behind, is one of those that are written."""
    return name in _NAMES or WEIGHTS.fullmatch(name) is not None


def _layer(name: str, dtype: str) -> dict[str, Any]:
    policy = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": dtype}, "registered_name": None}
    return {"name": name, "trainable": True, "dtype": policy}


def _object(class_name: str, settings: dict[str, Any], file: str | None = None) -> dict[str, Any]:
    return {
        "module": f"keras_hub.src.models.gemma.{_MODULES[class_name]}",
        "class_name": class_name,
        "config": settings if file is None else {**settings, "config_file": file},
        "registered_name": f"keras_hub>{class_name}",
    }
