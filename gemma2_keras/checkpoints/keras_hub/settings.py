"""What a preset folder in KerasHub's format says of its model: configuration, tokenizer and preprocessor."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gemma2_keras.checkpoints.guard import path_inside, read_json, shown, some
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import CheckpointError

CONFIG_FILE = "config.json"
METADATA_FILE = "metadata.json"
TASK_FILE = "task.json"
TOKENIZER_FILE = "tokenizer.json"
PREPROCESSOR_FILE = "preprocessor.json"
VOCABULARY_FILE = "assets/tokenizer/vocabulary.spm"

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
SAME_NAMES = (
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
GEMMA2_FLAGS = ("use_post_ffw_norm", "use_post_attention_norm", "use_sliding_window_attention")
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
TOKENIZER_SETTINGS = {"proto": None, "sequence_length": None, "add_bos": False, "add_eos": False}

# No dimension of a model that could be loaded is larger.
_LARGEST_SIZE = 2**31 - 1


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
    for key in GEMMA2_FLAGS:
        if settings.get(key) is not True:
            raise CheckpointError(
                f"`{key}` is {shown(settings.get(key))} in {CONFIG_FILE}: this is Gemma 1, or no Gemma; only Gemma 2, "
                "where it is true, is read here."
            )
    known = {*SAME_NAMES, *GEMMA2_FLAGS, "intermediate_dim", "query_head_dim_normalize"}
    missing = sorted(known - set(settings))
    if missing:
        raise CheckpointError(f"The configuration lacks `{'`, `'.join(missing)}`.")
    _refuse_unknown(settings, known | _HARMLESS, CONFIG_FILE)
    _check_policy(settings.get("dtype"))
    for key in (*SAME_NAMES, "intermediate_dim"):
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
        parsed = Gemma2Config(**{key: settings[key] for key in SAME_NAMES}, intermediate_dim=both // 2)
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
    _refuse_unknown(settings, {*TOKENIZER_SETTINGS, *_HARMLESS, "config_file"}, file)
    for key, only in TOKENIZER_SETTINGS.items():
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
