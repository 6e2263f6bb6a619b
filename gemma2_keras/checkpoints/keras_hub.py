"""Preset folders in KerasHub's format, read and written without building a model of KerasHub's.

Folders of KerasNLP, as KerasHub was called when the first Gemma 2 presets were made, are read as well.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import re
import warnings
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np

from gemma2_keras.checkpoints.contents import Checkpoint, shards_of
from gemma2_keras.checkpoints.guard import path_inside, read_json, shown, some
from gemma2_keras.checkpoints.hdf5 import Hdf5File
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.checkpoints.saving import write_json
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import CheckpointError

CONFIG_FILE = "config.json"
METADATA_FILE = "metadata.json"
TASK_FILE = "task.json"
TOKENIZER_FILE = "tokenizer.json"
PREPROCESSOR_FILE = "preprocessor.json"
WEIGHTS_FILE = "model.weights.h5"
INDEX_FILE = "model.weights.json"
_SHARD = re.compile(r"model_[0-9]{1,10}\.weights\.h5")
VOCABULARY_FILE = "assets/tokenizer/vocabulary.spm"

# Class -> its module, as KerasHub writes it.
_MODULES = {
    "GemmaBackbone": "gemma_backbone",
    "GemmaCausalLM": "gemma_causal_lm",
    "GemmaCausalLMPreprocessor": "gemma_causal_lm_preprocessor",
    "GemmaTokenizer": "gemma_tokenizer",
}
_MODULE = re.compile(r"keras_(hub|nlp)(\.\w{1,40}){0,8}")
# What stands beside the class of an object; the last four say nothing about what it computes.
_OBJECT_KEYS = {
    "module",
    "class_name",
    "registered_name",
    "config",
    "build_config",
    "compile_config",
    "assets",
    "weights",
}

# Hyperparameters that KerasHub has under our names.
_SAME = (
    "vocabulary_size",
    "num_layers",
    "num_query_heads",
    "num_key_value_heads",
    "hidden_dim",
    "head_dim",
    "layer_norm_epsilon",
    "dropout",
    "attention_logit_soft_cap",
    "final_logit_soft_cap",
    "sliding_window_size",
)
# Switches that are on in Gemma 2; in Gemma 1 they are off, or not there.
_GEMMA2 = ("use_post_ffw_norm", "use_post_attention_norm", "use_sliding_window_attention")
_HARMLESS = {"name", "trainable", "dtype"}
_POLICIES = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "mixed_bfloat16": "float32",
    "mixed_float16": "float32",
}
_POLICY_CLASSES = ("DTypePolicy", "FloatDTypePolicy")
# Key of a tokenizer -> the only value that means what ours does.
_TOKENIZER = {"proto": None, "sequence_length": None, "add_bos": False, "add_eos": False}

# No dimension of a model that could be loaded is larger.
_LARGEST_SIZE = 2**31 - 1

# What KerasHub's Gemma has no hyperparameter for, or ignores.
_ROPE_BASE, _EPSILON = 10_000.0, 1e-6
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def is_keras_hub(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is KerasHub's: it names a class, which transformers' never does.

    >>> is_keras_hub({"model_type": "gemma2"})
    False
    """
    return "registered_name" in config


def parse_config(config: dict[str, Any]) -> Gemma2Config:
    """KerasHub's `config.json` as hyperparameters; refuses what would change the mathematics.

    `query_head_dim_normalize=False` means here what KerasHub documents, a scale of (width / heads)^(-1/2). KerasHub up
    to 0.32 ignores it and always scales by the head size, which is wrong for Gemma 2 27B.

    Args:
        config: the content of the file.

    Raises:
        CheckpointError: names the key that is missing, unknown or has a value that is not implemented.
    """
    settings = _settings(config, "GemmaBackbone", CONFIG_FILE)
    for key in _GEMMA2:
        if settings.get(key) is not True:
            raise CheckpointError(
                f"`{key}` is {shown(settings.get(key))} in {CONFIG_FILE}: this is Gemma 1, or no Gemma; only Gemma 2, "
                "where it is true, is read here."
            )
    known = {*_SAME, *_GEMMA2, "intermediate_dim", "query_head_dim_normalize"}
    missing = sorted(known - set(settings))
    if missing:
        raise CheckpointError(f"The configuration lacks `{'`, `'.join(missing)}`.")
    _refuse_unknown(settings, known | _HARMLESS, CONFIG_FILE)
    _check_policy(settings.get("dtype"))
    for key in (*_SAME, "intermediate_dim"):
        value = settings[key]
        if not isinstance(value, int | float | None) or (isinstance(value, int) and abs(value) > _LARGEST_SIZE):
            raise CheckpointError(
                f"`{key}` must be a number of at most {_LARGEST_SIZE} in {CONFIG_FILE}; it is {shown(value)}."
            )
    both, by_head = settings["intermediate_dim"], settings["query_head_dim_normalize"]
    if not isinstance(both, int) or both % 2:
        raise CheckpointError(
            f"`intermediate_dim` must be even in {CONFIG_FILE}, gate and up together; it is {shown(both)}."
        )
    if not isinstance(by_head, bool):
        raise CheckpointError(f"`query_head_dim_normalize` must be true or false; it is {shown(by_head)}.")
    try:
        parsed = Gemma2Config(**{key: settings[key] for key in _SAME}, intermediate_dim=both // 2)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"The configuration describes no Gemma 2 model: {error}") from error
    if by_head:
        return parsed
    if parsed.hidden_dim % parsed.num_query_heads:
        raise CheckpointError(
            f"`query_head_dim_normalize` is false, and `hidden_dim` {parsed.hidden_dim} is no multiple of "
            f"`num_query_heads` {parsed.num_query_heads}: what the attention is scaled by is not defined."
        )
    return Gemma2Config(
        **{**parsed.to_dict(), "query_pre_attention_scalar": parsed.hidden_dim // parsed.num_query_heads}
    )


def _settings(value: Any, class_name: str, file: str) -> dict[str, Any]:
    """The settings of a serialised object of the one class that belongs there; no class is imported or looked up."""
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds {shown(value)} where a {class_name} belongs.")
    named, registered, module = (value.get(key) for key in ("class_name", "registered_name", "module"))
    if (
        named != class_name
        or registered not in (f"keras_hub>{class_name}", f"keras_nlp>{class_name}")
        or not (isinstance(module, str) and _MODULE.fullmatch(module))
    ):
        raise CheckpointError(
            f"{file} names the class {shown(named)}, registered as {shown(registered)}, of {shown(module)}; only "
            f"KerasHub's {class_name} is read here."
        )
    _refuse_unknown(value, _OBJECT_KEYS, file)
    settings = value.get("config")
    if not isinstance(settings, dict):
        raise CheckpointError(f"`config` in {file} must be an object; it is {shown(settings)}.")
    return settings


def _refuse_unknown(value: dict[str, Any], known: set[str], file: str) -> None:
    unknown = set(value) - known
    if unknown:
        raise CheckpointError(
            f"{file} has {some(unknown)}, unknown here: it could change what the model "
            "computes. If you know that it does not, remove it from the file."
        )


def _check_policy(dtype: Any) -> None:
    """See to it that a dtype policy, which KerasNLP left out or wrote in other ways, is one of plain numbers."""
    name = dtype
    if isinstance(dtype, dict) and dtype.get("class_name") in _POLICY_CLASSES and isinstance(dtype.get("config"), dict):
        name = dtype["config"].get("name")
    if name is not None and not (isinstance(name, str) and name in _POLICIES):
        raise CheckpointError(
            f"`dtype` in {CONFIG_FILE} is {shown(dtype)}; allowed: {', '.join(_POLICIES)}. Quantized models of "
            "KerasHub's are not read."
        )


def find_vocabulary(folder: Path) -> Path | None:
    """The SentencePiece model of a preset folder, or `None` if there is no tokenizer.

    Raises:
        CheckpointError: if the folder describes another tokenizer than Gemma's, or one that adds tokens itself.
    """
    description, vocabulary = path_inside(folder, TOKENIZER_FILE), path_inside(folder, VOCABULARY_FILE)
    if description.exists():
        _check_tokenizer(read_json(description), TOKENIZER_FILE)
        if not vocabulary.exists():
            raise CheckpointError(f"{folder} has a {TOKENIZER_FILE} and no {VOCABULARY_FILE}.")
    return vocabulary if vocabulary.exists() else None


def _check_tokenizer(value: Any, file: str) -> None:
    settings = _settings(value, "GemmaTokenizer", file)
    _refuse_unknown(settings, {*_TOKENIZER, *_HARMLESS, "config_file"}, file)
    for key, only in _TOKENIZER.items():
        if settings.get(key, only) is not only:
            raise CheckpointError(
                f"`{key}` of the tokenizer in {file} is {shown(settings[key])}, which is not implemented; allowed: "
                f"{only!r}."
            )


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """`sequence_length`, `add_start_token` and `add_end_token` of a preset folder, those that it has.

    Raises:
        CheckpointError: if the folder describes another preprocessor than that of Gemma's causal language model.
    """
    path = path_inside(folder, PREPROCESSOR_FILE)
    if not path.exists():
        return {}
    settings = _settings(read_json(path), "GemmaCausalLMPreprocessor", PREPROCESSOR_FILE)
    types = {"sequence_length": int, "add_start_token": bool, "add_end_token": bool}
    _refuse_unknown(settings, {*types, *_HARMLESS, "tokenizer", "config_file"}, PREPROCESSOR_FILE)
    if settings.get("tokenizer") is not None:
        _check_tokenizer(settings["tokenizer"], PREPROCESSOR_FILE)
    for key, kind in types.items():
        value = settings.get(key)
        if value is not None and (type(value) is not kind or (kind is int and value < 2)):
            raise CheckpointError(
                f"`{key}` in {PREPROCESSOR_FILE} must be "
                f"{'a whole number of at least 2' if kind is int else 'true or false'}; it is {shown(value)}."
            )
    return {key: settings[key] for key in types if settings.get(key) is not None}


class KerasHubCheckpoint:
    """The configuration and the tensors of a KerasHub preset folder, whole and as expected before any is read.

    Args:
        folder: holds `config.json` and `model.weights.h5`, or `model.weights.json` and the shards that it names.

    Attributes:
        config: the architecture.

    Raises:
        CheckpointError: if a file is missing, truncated or broken, or a tensor is missing, extra, misshapen or of a
            dtype other than float32, bfloat16 and float16; the message names it.
    """

    mapped = False

    def __init__(self, folder: Path) -> None:
        self.config = parse_config(read_json(path_inside(folder, CONFIG_FILE)))
        self._file_of = _arrays(folder)
        if self.config.num_layers > len(self._file_of):
            raise CheckpointError(
                f"{folder} has {len(self._file_of)} tensors, too few for the {self.config.num_layers} layers of the "
                "configuration."
            )
        self._weights = weight_map(self.config)
        expected = {_path(weight.keras_hub): name for name, weight in self._weights.items()}
        missing, extra = expected.keys() - self._file_of.keys(), self._file_of.keys() - expected.keys()
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} tensors: {some(missing)}.")
        if extra:
            raise CheckpointError(f"{folder} has {len(extra)} tensors that no Gemma 2 has: {some(extra)}.")
        for path, name in expected.items():
            found = self._file_of[path].arrays[path].shape
            asked = _stored_shape(name, self._weights[name].shape, self.config.head_dim)
            if found != asked:
                raise CheckpointError(f"Tensor {path!r} has shape {found}; the configuration asks {asked}.")

    @property
    def dtype(self) -> str:
        """The dtype of the tensors; float32 where they differ."""
        dtypes = {file.arrays[path].dtype for path, file in self._file_of.items()}
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    def read(self, name: str) -> np.ndarray:
        """One tensor by its name in transformers' format, (out, in); where it can it is a view of the file.

        Raises:
            CheckpointError: if the file has become shorter since it was checked.
        """
        path = _path(self._weights[name].keras_hub)
        return _from_stored(name, self._file_of[path].read(path), self._weights[name].shape)


def _path(group: str) -> str:
    return f"{group}/vars/0"


def _arrays(folder: Path) -> dict[str, Hdf5File]:
    """Where each array is, the files checked against the index if there is one."""
    single, index_path = path_inside(folder, WEIGHTS_FILE), path_inside(folder, INDEX_FILE)
    if single.exists():
        file = Hdf5File(single)
        return dict.fromkeys(file.arrays, file)
    if not index_path.exists():
        raise CheckpointError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}: there are no weights to load.")
    index = read_json(index_path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder / INDEX_FILE} has no `weight_map`.")
    promised: dict[Path, set[str]] = {}
    for group, shard in index.items():
        if not (isinstance(shard, str) and _SHARD.fullmatch(shard)):
            raise CheckpointError(
                f"{folder / INDEX_FILE} names {shown(shard)} as a file of weights; only model_*.weights.h5 are read."
            )
        promised.setdefault(path_inside(folder, shard), set()).add(f"{group.removeprefix('/')}/0")
    file_of: dict[str, Hdf5File] = {}
    for path, names in promised.items():
        file = Hdf5File(path)
        if file.arrays.keys() != names:
            differing = some(file.arrays.keys() ^ names)
            raise CheckpointError(f"{path} does not hold what the index says: {differing} in one of them only.")
        file_of |= dict.fromkeys(file.arrays, file)
    return file_of


# The last part of a tensor's name says how KerasHub keeps it: projections to heads as (head, in, size), that from
# heads as (head, size, out), other matrices as (in, out), and all else as we do.
_TO_HEADS, _FROM_HEADS = {"q_proj", "k_proj", "v_proj"}, {"o_proj"}
_TURNED = {"gate_proj", "up_proj", "down_proj"}


def _kind(name: str) -> str:
    return name.split(".")[-2]


def _stored_shape(name: str, shape: tuple[int, ...], head_dim: int) -> tuple[int, ...]:
    if _kind(name) in _TO_HEADS:
        return (shape[0] // head_dim, shape[1], head_dim)
    if _kind(name) in _FROM_HEADS:
        return (shape[1] // head_dim, head_dim, shape[0])
    return shape[::-1] if _kind(name) in _TURNED else shape


def _from_stored(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if _kind(name) in _TO_HEADS:
        return value.transpose(0, 2, 1).reshape(shape)
    if _kind(name) in _FROM_HEADS:
        return value.reshape(-1, shape[0]).T
    return value.T if _kind(name) in _TURNED else value


def _to_stored(name: str, value: np.ndarray, head_dim: int) -> np.ndarray:
    if _kind(name) in _TO_HEADS:
        return value.reshape(-1, head_dim, value.shape[1]).transpose(0, 2, 1)
    if _kind(name) in _FROM_HEADS:
        return value.T.reshape(-1, head_dim, value.shape[0])
    return value.T if _kind(name) in _TURNED else value


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
        tokenizer = _object("GemmaTokenizer", {**_layer("gemma_tokenizer", "int32"), **_TOKENIZER}, TOKENIZER_FILE)
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
        _write_weights(folder, checkpoint, max_shard_size)
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
        _warn(
            f"scales attention by the head size, {config.head_dim}, whatever its configuration says (seen in 0.32): "
            f"its logits will not be those of this model, whose `query_pre_attention_scalar` is {scalar:g}."
        )
    if config.layer_norm_epsilon != _EPSILON:
        _warn(
            f"uses `layer_norm_epsilon` {config.layer_norm_epsilon:g} in the last norm and {_EPSILON:g} in all others "
            "(seen in 0.32): its logits will not quite be those of this model."
        )
    if config.context_length != Gemma2Config.context_length:
        _warn(f"keeps no `context_length`: who loads the folder may go beyond this model's {config.context_length}.")
    settings = {
        **_layer("gemma_backbone", dtype),
        **{key: getattr(config, key) for key in _SAME},
        **dict.fromkeys(_GEMMA2, True),
        "intermediate_dim": 2 * config.intermediate_dim,
        "query_head_dim_normalize": by_head,
    }
    return _object("GemmaBackbone", settings)


def _warn(what: str) -> None:
    # The caller of `write_keras_hub`.
    warnings.warn(f"KerasHub {what}", UserWarning, stacklevel=4)


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


def _write_weights(folder: Path, checkpoint: Checkpoint, max_shard_size: float | None) -> None:
    """Write all tensors, into several files and an index if they are more than `max_shard_size` GB."""
    weights, shards = weight_map(checkpoint.config), shards_of(checkpoint, max_shard_size)
    files = [WEIGHTS_FILE] if len(shards) == 1 else [f"model_{i:05d}.weights.h5" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        # Bounds on the format, lest another default of the library's be one that nobody has read.
        with h5py.File(folder / file, "w", libver=("earliest", "latest")) as opened:
            if file == files[0]:
                # Older versions of Keras look for the model's own variables, of which there are none.
                opened.create_group("vars").attrs["name"] = "gemma_backbone"
            for name in names:
                value = _to_stored(name, checkpoint.read(name), checkpoint.config.head_dim)
                group = opened.create_group(f"{weights[name].keras_hub}/vars")
                if value.dtype == _BFLOAT16:
                    # HDF5 has no such number: Keras keeps it as two bytes with a note.
                    group.create_dataset("0", data=np.ascontiguousarray(value).view("V2")).attrs["dtype"] = "bfloat16"
                else:
                    group.create_dataset("0", data=value)
    if len(files) > 1:
        shard_of = {
            f"/{weights[name].keras_hub}/vars": file
            for file, names in zip(files, shards, strict=True)
            for name in names
        }
        total = checkpoint.config.parameter_count * np.dtype(checkpoint.dtype).itemsize
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": shard_of})
