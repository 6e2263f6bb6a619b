"""Models into the formats of other programs: from memory, or from one file to another without a model in between."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma2_keras.checkpoints.adapters import StoredAdapter, read_adapter, write_adapter_files
from gemma2_keras.checkpoints.contents import Checkpoint, ConvertedCheckpoint, WatchedCheckpoint
from gemma2_keras.checkpoints.gguf.writing import write_gguf
from gemma2_keras.checkpoints.hub import resolve
from gemma2_keras.checkpoints.keras_hub.settings import METADATA_FILE
from gemma2_keras.checkpoints.keras_hub.writing import is_of_keras_hub, write_keras_hub
from gemma2_keras.checkpoints.names import projections
from gemma2_keras.checkpoints.own_file import FORMAT, HAS_ADAPTER, OWN_FILE
from gemma2_keras.checkpoints.presets import (
    ADAPTER_FOLDER,
    check_shard_size,
    opened,
    ours_in,
    write_model,
    write_settings,
)
from gemma2_keras.checkpoints.saving import replacing_folder, write_json
from gemma2_keras.checkpoints.tokenizer_files import write_tokenizer
from gemma2_keras.config import Gemma2Config
from gemma2_keras.layers.low_rank import merged
from gemma2_keras.preprocessing.causal_lm_preprocessor import Gemma2CausalLMPreprocessor
from gemma2_keras.preprocessing.tokenizer import Gemma2Tokenizer

FORMATS = ("transformers", "keras-hub", "gguf")
DTYPES = ("float32", "bfloat16", "float16")


class AdaptedCheckpoint:
    """A checkpoint with an adapter merged into each weight as it is read.

    Args:
        checkpoint: the weights without it.
        adapter: of that model.
    """

    mapped = False

    def __init__(self, checkpoint: Checkpoint, adapter: StoredAdapter) -> None:
        self.config = checkpoint.config
        self._checkpoint = checkpoint
        self._adapter = adapter

    @property
    def dtype(self) -> str:
        """The dtype of the tensors."""
        return self._checkpoint.dtype

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the checkpoint."""
        module, weight = name.removesuffix(".weight"), self._checkpoint.read(name)
        specs = self._adapter.specs
        if module not in specs:
            return weight
        # What becomes infinite is found where tensors are watched.
        with np.errstate(over="ignore"):
            return merged(weight, specs[module], self._adapter.weights[module])


def export_transformers(
    folder: str | os.PathLike,
    checkpoint: Checkpoint,
    preprocessor: Any = None,
    *,
    dtype: str | None = None,
    max_shard_size: float | None = 10,
    adapted: tuple[Any, str] | None = None,
) -> None:
    """Write a folder for `AutoModelForCausalLM` and `AutoTokenizer`, which `from_preset` reads as well.

    Args:
        folder: where; an earlier one of ours there is replaced, and stays as it was if writing fails.
        checkpoint: the weights.
        preprocessor: a `Gemma2CausalLMPreprocessor`; `None` writes no tokenizer.
        dtype: of the weights; `None` is the checkpoint's.
        max_shard_size: most GB in one file of weights; `None` for a single file.
        adapted: a backbone and the name of the adapter of it that is written beside the weights, into `adapter/`.
    """
    _check_dtype(dtype, DTYPES)
    check_shard_size(max_shard_size)
    _check_config(checkpoint.config)
    with replacing_folder(folder, OWN_FILE, ours_in(folder)) as beside:
        own: dict[str, Any] = {"format": FORMAT}
        own |= write_model(beside, ConvertedCheckpoint(checkpoint, dtype), max_shard_size)
        if preprocessor is not None:
            write_tokenizer(beside, preprocessor.tokenizer)
            own |= write_settings(beside, preprocessor.tokenizer, preprocessor)
        if adapted is not None:
            own[HAS_ADAPTER] = True
            (beside / ADAPTER_FOLDER).mkdir()
            write_adapter_files(beside / ADAPTER_FOLDER, *adapted)
        write_json(beside / OWN_FILE, own)


def _check_config(config: Gemma2Config) -> None:
    """Refuse what transformers refuses to load, though it could compute it."""
    scalar = config.query_pre_attention_scalar
    if scalar is not None and not float(scalar).is_integer():
        raise ValueError(
            f"`query_pre_attention_scalar` is {scalar}; transformers takes whole numbers alone. "
            "`save_to_preset` keeps it."
        )
    if config.hidden_dim % config.num_query_heads:
        raise ValueError(
            f"`hidden_dim` is {config.hidden_dim}, which transformers takes only as a multiple of `num_query_heads`, "
            f"{config.num_query_heads}. `save_to_preset` keeps it."
        )


def export_keras_hub(
    folder: str | os.PathLike,
    checkpoint: Checkpoint,
    preprocessor: Any = None,
    *,
    dtype: str | None = None,
    max_shard_size: float | None = 10,
) -> None:
    """Write a folder for `keras_hub.models.GemmaCausalLM.from_preset`.

    Arguments are as of `export_transformers`; an earlier folder in KerasHub's format is replaced.

    Raises:
        ValueError: if KerasHub's Gemma has no hyperparameter for what the model computes.

    Warns:
        UserWarning: if KerasHub computes something else than what is written.
    """
    _check_dtype(dtype, DTYPES)
    check_shard_size(max_shard_size)
    settings = {}
    if preprocessor is not None:
        names = ("sequence_length", "add_start_token", "add_end_token")
        settings = {"proto": preprocessor.tokenizer.proto, **{name: getattr(preprocessor, name) for name in names}}
    with replacing_folder(folder, METADATA_FILE, is_of_keras_hub, "KerasHub preset") as beside:
        write_keras_hub(beside, ConvertedCheckpoint(checkpoint, dtype), max_shard_size=max_shard_size, **settings)


def export_gguf(
    path: str | os.PathLike, checkpoint: Checkpoint, preprocessor: Any = None, *, dtype: str | None = None
) -> None:
    """Write a GGUF file, and a `Modelfile` beside it; see `gguf.write_gguf`."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise TypeError(f"The file to write must be a path; given {path!r}.")
    proto = None if preprocessor is None else preprocessor.tokenizer.proto
    stop_ids: Sequence[int] | None = None if preprocessor is None else preprocessor.tokenizer.stop_token_ids
    write_gguf(path, checkpoint, proto, dtype=dtype, stop_token_ids=stop_ids)


def _check_dtype(dtype: Any, allowed: Sequence[str]) -> None:
    if dtype is not None and dtype not in allowed:
        raise ValueError(f"`dtype` must be {', '.join(allowed)}, or None for that of the weights; given {dtype!r}.")


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: str,
    *,
    dtype: str | None = None,
    adapter: str | os.PathLike | None = None,
    check_finite: bool = True,
) -> None:
    """Write a preset in another format, one tensor at a time, without making a model of it.

    Args:
        source: a name, handle, folder or GGUF file, as `from_preset` takes it.
        target: the folder or, for GGUF, the file to write.
        to: `"transformers"`, `"keras-hub"` or `"gguf"`.
        dtype: `"float32"`, `"bfloat16"`, `"float16"` or, for GGUF, `"q8_0"`; `None` keeps that of the weights.
        adapter: folder of an adapter of PEFT's format, to be merged into the weights.
        check_finite: whether weights that are NaN or infinite are refused.

    Raises:
        PresetError: if the source leads nowhere.
        CheckpointError: if it, or the adapter, is not whole.
        FileExistsError: if something else than an earlier result stands at `target`.
        ValueError: if `to` or `dtype` is none of these, or the format cannot hold the model.
    """
    if to not in FORMATS:
        raise ValueError(f"`to` must be one of {', '.join(FORMATS)}; given {to!r}.")
    if to != "gguf":
        _check_dtype(dtype, DTYPES)
    stored, config, contents = opened(source)
    if dtype == "q8_0" and os.path.exists(target) and os.path.samefile(target, resolve(source)):
        raise ValueError(f"{target} is the source, and quantised it could not be read again: choose another path.")
    proto, preprocessor = stored.proto(), None
    if proto is not None:
        tokenizer = Gemma2Tokenizer(proto, **stored.settings("tokenizer"))
        preprocessor = Gemma2CausalLMPreprocessor(tokenizer, **stored.settings("preprocessor"))
    if adapter is not None:
        contents = AdaptedCheckpoint(contents, read_adapter(adapter, projections(config), check_finite))
    with WatchedCheckpoint(contents, "Converting", check_finite) as contents:
        if to == "gguf":
            export_gguf(target, contents, preprocessor, dtype=dtype)
        elif to == "keras-hub":
            export_keras_hub(target, contents, preprocessor, dtype=dtype)
        else:
            export_transformers(target, contents, preprocessor, dtype=dtype)
