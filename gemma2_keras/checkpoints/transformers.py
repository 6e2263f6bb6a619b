"""Checkpoints in the format of Hugging Face transformers, read and written without that library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gemma2_keras.checkpoints.contents import Checkpoint, shards_of
from gemma2_keras.checkpoints.guard import file_inside, read_json, shown, some
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.checkpoints.saving import write_json
from gemma2_keras.checkpoints.tensor_files import TensorFile, write_tensors
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import CheckpointError

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.model"

_TIED_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS_COMPARED = 2**12

# Their key -> our hyperparameter. All must be there.
_ARCHITECTURE = {
    "vocab_size": "vocabulary_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_size": "hidden_dim",
    "intermediate_size": "intermediate_dim",
    "head_dim": "head_dim",
    "query_pre_attn_scalar": "query_pre_attention_scalar",
    "attn_logit_softcapping": "attention_logit_soft_cap",
    "final_logit_softcapping": "final_logit_soft_cap",
    "sliding_window": "sliding_window_size",
    "rms_norm_eps": "layer_norm_epsilon",
    "max_position_embeddings": "context_length",
}
# Keys that change the mathematics, and the values that mean what we compute.
_FIXED: dict[str, tuple] = {
    "model_type": ("gemma2",),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "hidden_act": ("gelu_pytorch_tanh", None),
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "tie_word_embeddings": (True,),
    "rope_scaling": (None,),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
    "pruned_heads": (None, {}),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
# Keys that say nothing about what is computed from token ids.
_HARMLESS = {
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "initializer_range",
    "use_cache",
    "cache_implementation",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "_name_or_path",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "is_decoder",
    "id2label",
    "label2id",
    "problem_type",
    "_attn_implementation_autoset",
}
_ROPE_KEYS = {"rope_theta", "rope_parameters"}


def parse_config(config: dict[str, Any]) -> Gemma2Config:
    """A transformers configuration as hyperparameters; refuses what would change the mathematics.

    Raises:
        CheckpointError: names the key that is missing, unknown or has a value that is not implemented.
    """
    if config.get("model_type") != "gemma2":
        raise CheckpointError(
            f'The checkpoint\'s `model_type` is {shown(config.get("model_type"))}; only "gemma2" is read here.'
        )
    for key, allowed in _FIXED.items():
        if key in config and config[key] not in allowed:
            raise CheckpointError(
                f"`{key}` is {shown(config[key])}, which is not implemented; allowed: {_either(allowed)}."
            )
    missing = [key for key in _ARCHITECTURE if key not in config]
    if missing:
        raise CheckpointError(f"The configuration lacks `{'`, `'.join(missing)}`.")
    unknown = sorted(set(config) - {*_ARCHITECTURE, *_FIXED, *_HARMLESS, *_ROPE_KEYS, "layer_types"})
    if unknown:
        raise CheckpointError(
            f"The configuration has {some(unknown)}, unknown here: it could change what the model computes. "
            "If you know that it does not, remove it from config.json."
        )
    hyperparameters = {ours: config[theirs] for theirs, ours in _ARCHITECTURE.items()}
    try:
        parsed = Gemma2Config(**hyperparameters, rope_max_wavelength=_rope_base(config))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"The configuration describes no Gemma 2 model: {error}") from error
    kinds = config.get("layer_types", ())
    # The length first: a list of as many layers as a broken file claims may not fit into memory.
    if "layer_types" in config and (
        not isinstance(kinds, list) or len(kinds) != parsed.num_layers or kinds != layer_types(parsed)
    ):
        raise CheckpointError(
            "`layer_types` must alternate, beginning with sliding_attention; another order is not implemented."
        )
    return parsed


def _either(values: tuple) -> str:
    return " or ".join("absent" if value is None else repr(value) for value in values)


def _rope_base(config: dict[str, Any]) -> Any:
    rope = config.get("rope_parameters")
    if rope is None:
        return config.get("rope_theta", 10_000.0)
    if not isinstance(rope, dict) or set(rope) - {"rope_theta", "rope_type"} or rope.get("rope_type") != "default":
        raise CheckpointError(f'`rope_parameters` is {shown(rope)}; only `rope_type` "default" is implemented.')
    base = rope.get("rope_theta", 10_000.0)
    if config.get("rope_theta", base) != base:
        raise CheckpointError(f"`rope_theta` is {shown(config['rope_theta'])} and {shown(base)} in one configuration.")
    return base


def layer_types(config: Gemma2Config) -> list[str]:
    """Each layer's kind of attention, as transformers names it."""
    return ["sliding_attention" if config.is_local(i) else "full_attention" for i in range(config.num_layers)]


def describe_config(config: Gemma2Config, dtype: str) -> dict[str, Any]:
    """The configuration file that transformers reads for these hyperparameters."""
    ours = config.to_dict()
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **{theirs: _typed(theirs, ours[name]) for theirs, name in _ARCHITECTURE.items()},
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "layer_types": layer_types(config),
        "rope_parameters": {"rope_theta": float(config.rope_max_wavelength), "rope_type": "default"},
        "dtype": dtype,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "use_cache": True,
    }


def _typed(key: str, value: Any) -> Any:
    """A number of the type that transformers insists on; a scalar that is no whole number stays, and is ours alone."""
    if key in ("attn_logit_softcapping", "final_logit_softcapping", "rms_norm_eps"):
        return None if value is None else float(value)
    return int(value) if float(value).is_integer() else value


class SafetensorsCheckpoint:
    """The tensors of a folder, whole and as expected before any is read: a `contents.Checkpoint`.

    Args:
        folder: holds `model.safetensors`, or its index and shards.
        config: the architecture that the tensors must fit.

    Raises:
        CheckpointError: if a file is missing, truncated or broken, or a tensor is missing, extra, misshapen or of a
            dtype other than float32, bfloat16 and float16; the message names it.
    """

    mapped = True

    def __init__(self, folder: Path, config: Gemma2Config) -> None:
        self.config = config
        self._file_of: dict[str, TensorFile] = {}
        for path, names in _files(folder).items():
            file = TensorFile(path)
            if names is not None and file.entries.keys() != names:
                raise CheckpointError(
                    f"{path} does not hold what the index says: {some(file.entries.keys() ^ names)} in one of them "
                    "only."
                )
            for name in file.entries:
                if name in self._file_of:
                    raise CheckpointError(f"Tensor {name!r} is in {self._file_of[name].path.name} and in {path.name}.")
                file.require_known(name)
                self._file_of[name] = file
        if config.num_layers > len(self._file_of):
            raise CheckpointError(
                f"{folder} has {len(self._file_of)} tensors, too few for the {config.num_layers} layers of the "
                "configuration."
            )
        weights = weight_map(config)
        tied_copy = self._file_of.pop(_TIED_OUTPUT, None)
        held = self._file_of.keys()
        missing, extra = weights.keys() - held, held - weights.keys()
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} tensors: {some(missing)}.")
        if extra:
            raise CheckpointError(f"{folder} has {len(extra)} tensors that no Gemma 2 has: {some(extra)}.")
        for name, weight in weights.items():
            shape = self._file_of[name].entries[name].shape
            if shape != weight.shape:
                raise CheckpointError(f"Tensor {name!r} has shape {shape}; the configuration asks {weight.shape}.")
        if tied_copy is not None:
            self._check_tied_copy(tied_copy)

    def _check_tied_copy(self, file: TensorFile) -> None:
        copy, table = file.read(_TIED_OUTPUT), self.read(_EMBEDDING)
        if copy.shape != table.shape:
            raise CheckpointError(
                f"{_TIED_OUTPUT!r} is no copy of {_EMBEDDING!r}; an output of its own is not implemented."
            )
        rows = range(0, len(table), _ROWS_COMPARED)
        if not all(np.array_equal(copy[i : i + _ROWS_COMPARED], table[i : i + _ROWS_COMPARED]) for i in rows):
            raise CheckpointError(f"{_TIED_OUTPUT!r} differs from {_EMBEDDING!r}; an untied output is not implemented.")

    @property
    def dtype(self) -> str:
        """The dtype of the tensors; float32 where they differ."""
        dtypes = {file.require_known(name).name for name, file in self._file_of.items()}
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    def read(self, name: str) -> np.ndarray:
        """One tensor, as a view of its file: what is written to it does not reach the file."""
        return self._file_of[name].read(name)


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """The files of weights, each with the tensors that the index promises in it (`None`: there is no index)."""
    single = file_inside(folder, WEIGHTS_FILE)
    if single.exists():
        return {single: None}
    if not (folder / INDEX_FILE).exists():
        raise CheckpointError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}: there are no weights to load.")
    shard_of = read_json(file_inside(folder, INDEX_FILE)).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(f"{folder / INDEX_FILE} has no `weight_map`.")
    files: dict[Path, set[str] | None] = {}
    for name, shard in shard_of.items():
        names = files.setdefault(file_inside(folder, shard), set())
        assert names is not None
        names.add(name)
    return files


def write_checkpoint(folder: Path, checkpoint: Checkpoint, max_shard_size: float | None = None) -> None:
    """Write configuration and weights as transformers reads them, one tensor at a time.

    Args:
        folder: an existing folder.
        checkpoint: what to write, in its dtype.
        max_shard_size: most GB in one file; `None` for a single file.
    """
    dtype = checkpoint.dtype
    write_json(folder / CONFIG_FILE, describe_config(checkpoint.config, dtype))
    shapes = {name: weight.shape for name, weight in weight_map(checkpoint.config).items()}
    shards = shards_of(checkpoint, max_shard_size)
    if len(shards) == 1:
        write_tensors(folder / WEIGHTS_FILE, shapes, dtype, checkpoint.read)
        return
    shard_of = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {name: shapes[name] for name in names}, dtype, checkpoint.read)
        shard_of.update(dict.fromkeys(names, file))
    total = checkpoint.config.parameter_count * np.dtype(dtype).itemsize
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": shard_of})
