"""Adapters in the format of PEFT, read and written without that library."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma2_keras.checkpoints.guard import file_inside, read_json, shown, some
from gemma2_keras.checkpoints.saving import replacing_folder, restore_folder, write_json
from gemma2_keras.checkpoints.tensor_files import TensorFile, write_tensors
from gemma2_keras.errors import CheckpointError
from gemma2_keras.kernels import array, stored
from gemma2_keras.layers.low_rank import LowRank
from gemma2_keras.models.adapters import ALL_LINEAR

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"

# Our name of an adapter's weight -> how the tensor's name ends behind the module's.
_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}
_PREFIX = "base_model.model."
# Modules that PEFT can adapt and we cannot.
_NOT_LINEAR = ("model.embed_tokens", "lm_head")

# Keys that change the mathematics, and the values that mean what we compute.
_FIXED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "lora_bias": (False,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "megatron_config": (None,),
    "enable_lora": (None,),
    "merge_weights": (False, None),
    # The others change the weights of the model beneath.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
# Keys that say nothing about what the adapter computes.
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
}
_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
_READ = {
    *_REQUIRED,
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
}
_LARGEST_ALPHA = 10**300
# An expression of these characters alone is quick whatever it says.
_PLAIN = re.compile(r"[\w.^$\\-]*")
# Others are foreign code, in effect: they run in a process of their own, which can be ended.
_SECONDS = 10
# Characters; what is longer is slow to compile. One pattern for each module of a model has 20,000.
_LONGEST = 100_000
_MATCHER = """
import json, re, sys
expressions, names = json.load(sys.stdin)
json.dump([[name for name in names if re.fullmatch(text, name)] for text in expressions], sys.stdout)
"""


class StoredAdapter(NamedTuple):
    """An adapter from a folder, whole and checked.

    Attributes:
        specs: the hyperparameters, by module.
        weights: the arrays of each module, by our names.
    """

    specs: dict[str, LowRank]
    weights: dict[str, dict[str, np.ndarray]]

    def add_to(self, backbone: Any, name: str, trainable: bool) -> None:
        """Add the adapter to a backbone, under a name."""
        backbone.add_adapter(name, self.specs, trainable)
        layers = backbone.linear_layers()
        for module, arrays in self.weights.items():
            for part, numbers in arrays.items():
                layers[module].adapters[name].variables[part].assign(numbers)


def read_adapter(
    folder: str | os.PathLike, shapes: Mapping[str, tuple[int, ...]], check_finite: bool = True
) -> StoredAdapter:
    """What PEFT, or `write_adapter`, saved in a folder, if it fits a model.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        shapes: of the model's projections, by module.
        check_finite: whether numbers that are NaN or infinite are refused.

    Raises:
        CheckpointError: if a file is missing, truncated or broken, the configuration asks for what is not implemented,
            or a tensor is missing, extra, misshapen or of a dtype other than float32, bfloat16 and float16.
    """
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise TypeError(f"The folder of an adapter must be a path; given {folder!r}.")
    path = Path(os.path.expanduser(folder))
    restore_folder(path)
    if not path.is_dir():
        raise CheckpointError(f"There is no folder {path}.")
    specs = parse_config(read_json(file_inside(path, CONFIG_FILE)), list(shapes))
    if not (path / WEIGHTS_FILE).exists() and (path / _PICKLE_FILE).exists():
        raise CheckpointError(
            f"{path / _PICKLE_FILE} is a pickle, which can run code and is not read. Save the adapter again with "
            "`safe_serialization=True` of PEFT."
        )
    expected = {
        _tensor_name(module, part): (module, part, shape)
        for module, spec in specs.items()
        for part, shape in _part_shapes(spec, shapes[module]).items()
    }
    weights: dict[str, dict[str, np.ndarray]] = {module: {} for module in specs}
    file = TensorFile(file_inside(path, WEIGHTS_FILE))
    held = file.entries.keys()
    if held != expected.keys():
        missing, extra = expected.keys() - held, held - expected.keys()
        raise CheckpointError(
            f"{path / WEIGHTS_FILE} is not what {CONFIG_FILE} says: "
            + "; ".join(
                f"{len(names)} tensors are {how}, {some(names)}"
                for how, names in (("missing", missing), ("not accounted for", extra))
                if names
            )
            + "."
        )
    for name, (_, _, shape) in expected.items():
        if file.entries[name].shape != shape:
            raise CheckpointError(
                f"Tensor {name!r} has shape {file.entries[name].shape}; the model and {CONFIG_FILE} ask {shape}."
            )
        file.require_known(name)
    for name, (module, part, _) in expected.items():
        numbers = weights[module][part] = file.read(name).astype("float32")
        if check_finite and not np.isfinite(numbers).all():
            raise CheckpointError(
                f"Tensor {name!r} holds numbers that are not finite (NaN or infinity): the adapter is damaged, or its "
                "training diverged."
            )
    return StoredAdapter(specs, weights)


def write_adapter(folder: str | os.PathLike, backbone: Any, name: Any) -> None:
    """Write one of a backbone's adapters as PEFT does, for `Gemma2ForCausalLM` of transformers.

    Args:
        folder: where; an earlier saved adapter there is replaced, and stays as it was if writing fails.
        backbone: a `Gemma2Backbone`.
        name: of the adapter.

    Raises:
        ValueError: if there is no such adapter.
        FileExistsError: if something else than a saved adapter stands at `folder`.
    """
    files = (CONFIG_FILE, WEIGHTS_FILE)
    with replacing_folder(folder, CONFIG_FILE, lambda file: file in (*files, _PICKLE_FILE), "adapter") as beside:
        write_adapter_files(beside, backbone, name)


def write_adapter_files(folder: Path, backbone: Any, name: Any) -> None:
    """Write what `write_adapter` writes, into an existing folder."""
    specs, layers = backbone.adapter_specs(name), backbone.linear_layers()
    variables = {
        _tensor_name(module, part): variable
        for module in specs
        for part, variable in layers[module].adapters[name].variables.items()
    }
    shapes = {key: tuple(variable.shape) for key, variable in variables.items()}
    write_json(folder / CONFIG_FILE, describe_config(specs, list(layers)))
    write_tensors(folder / WEIGHTS_FILE, shapes, "float32", lambda key: array(stored(variables[key])))


def _tensor_name(module: str, part: str) -> str:
    return f"{_PREFIX}{module}.{_PARTS[part]}"


def _part_shapes(spec: LowRank, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors beside a weight of shape (out, in)."""
    shapes: dict[str, tuple[int, ...]] = {"lora_a": (spec.rank, shape[1]), "lora_b": (shape[0], spec.rank)}
    return {**shapes, "lora_magnitude": shape[:1]} if spec.use_dora else shapes


def describe_config(specs: Mapping[str, LowRank], modules: list[str]) -> dict[str, Any]:
    """The configuration file that PEFT reads for these hyperparameters.

    Args:
        specs: hyperparameters of the adapted modules; they may differ in rank and alpha.
        modules: all modules of the model.
    """
    ranks = {module: spec.rank for module, spec in specs.items()}
    alphas = {module: _plain(spec.rank if spec.alpha is None else spec.alpha) for module, spec in specs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    common = next(iter(specs.values()))
    short = {module.rpartition(".")[2] for module in specs}
    whole = {module for module in modules if module.rpartition(".")[2] in short} == set(specs)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": common.dropout,
        "use_rslora": common.use_rslora,
        "use_dora": common.use_dora,
        "target_modules": sorted(short if whole else specs),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def parse_config(config: dict[str, Any], modules: list[str]) -> dict[str, LowRank]:
    """PEFT's configuration as hyperparameters of each module; refuses what would change the mathematics.

    Args:
        config: what `adapter_config.json` holds.
        modules: the names of the model's projections.

    Raises:
        CheckpointError: names the key that is missing, unknown or has a value that is not implemented.
    """
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise CheckpointError(f"{CONFIG_FILE} lacks `{'`, `'.join(missing)}`.")
    for key, allowed in _FIXED.items():
        # By type too: 1 equals True.
        if key in config and not any(type(config[key]) is type(a) and config[key] == a for a in allowed):
            raise CheckpointError(
                f"`{key}` in {CONFIG_FILE} is {shown(config[key])}, which is not implemented; allowed: "
                f"{', '.join(map(repr, allowed))}."
            )
    unknown = set(config) - _READ - _FIXED.keys() - _HARMLESS
    if unknown:
        raise CheckpointError(
            f"{CONFIG_FILE} has {some(unknown)}, unknown here: it could change what the adapter computes. If "
            "you know that it does not, remove it from the file."
        )
    ranks, alphas = (_by_pattern(config, key, modules) for key in ("rank_pattern", "alpha_pattern"))
    flags = {key: config.get(key, False) for key in ("use_rslora", "use_dora")}
    specs = {}
    for module in _targets(config, modules):
        rank, alpha = ranks.get(module, config["r"]), alphas.get(module, config["lora_alpha"])
        if alpha is None or (isinstance(alpha, int) and abs(alpha) > _LARGEST_ALPHA):
            raise CheckpointError(
                f"`lora_alpha` or `alpha_pattern` in {CONFIG_FILE} must be numbers; one is {shown(alpha)}."
            )
        try:
            specs[module] = LowRank(rank, alpha, config.get("lora_dropout", 0.0), **flags)
        except ValueError as error:
            raise CheckpointError(f"{CONFIG_FILE} describes no adapter of {module}: {error}") from error
    return specs


def _targets(config: dict[str, Any], modules: list[str]) -> list[str]:
    """The modules that a configuration adapts, by PEFT's rules."""
    targets = config["target_modules"]
    everywhere = isinstance(targets, str) and targets.lower() == ALL_LINEAR
    chosen = modules if everywhere else _matching(targets, "target_modules", [*modules, *_NOT_LINEAR])
    layers = config.get("layers_to_transform")
    if layers is not None and layers != []:
        if isinstance(targets, str):
            raise CheckpointError(f"`layers_to_transform` in {CONFIG_FILE} needs a list as `target_modules`.")
        indices = layers if isinstance(layers, list) else [layers]
        if not all(type(index) is int for index in indices):
            raise CheckpointError(
                f"`layers_to_transform` in {CONFIG_FILE} must be whole numbers; it is {shown(layers)}."
            )
        patterns = config.get("layers_pattern") or ["layers"]
        if patterns != "layers" and not (isinstance(patterns, list) and "layers" in patterns):
            raise CheckpointError(
                f'`layers_pattern` in {CONFIG_FILE} is {shown(patterns)}; only "layers" is implemented.'
            )
        wanted = {f"model.layers.{index}." for index in indices}
        chosen = [name for name in chosen if name.startswith(tuple(wanted))]
    excluded = config.get("exclude_modules")
    if excluded:
        without = set(_matching(excluded, "exclude_modules", chosen))
        chosen = [name for name in chosen if name not in without]
    refused = [name for name in chosen if name in _NOT_LINEAR]
    if refused:
        raise CheckpointError(
            f"`target_modules` in {CONFIG_FILE} takes in {refused[0]}; adapters of projections alone are implemented."
        )
    if not chosen:
        raise CheckpointError(
            f"`target_modules` in {CONFIG_FILE} matches no projection of the model: {shown(targets)}."
        )
    return chosen


def _matching(targets: Any, key: str, names: list[str]) -> list[str]:
    """The names that a list of names, or of their ends, or a regular expression matches."""
    if isinstance(targets, str):
        found = _matched([targets], names, key)[0]
        return [name for name in names if name in found]
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(
            f"`{key}` in {CONFIG_FILE} must be a string or a list of strings; it is {shown(targets)}."
        )
    wanted = set(targets)
    return [name for name in names if any(end in wanted for end in _ends(name))]


def _ends(name: str) -> list[str]:
    """A name, and what follows each of its dots."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _by_pattern(config: dict[str, Any], key: str, modules: list[str]) -> dict[str, Any]:
    """The values that some modules have, chosen by regular expressions; the first that matches counts."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(f"`{key}` in {CONFIG_FILE} must be an object; it is {shown(patterns)}.")
    values: dict[str, Any] = {}
    for value, found in zip(patterns.values(), _matched(list(patterns), modules, key, "(.*\\.)?({})$"), strict=True):
        values = {**dict.fromkeys(found, value), **values}
    return values


def _matched(expressions: list[str], names: list[str], key: str, within: str = "{}") -> list[set[str]]:
    """The names that each expression of a file matches as a whole, once it is put in the place of `{}`."""
    if sum(map(len, expressions)) > _LONGEST:
        raise CheckpointError(
            f"`{key}` in {CONFIG_FILE} has expressions of more than {_LONGEST:,} characters: write the names of the "
            "modules."
        )
    whole = [within.replace("{}", text) for text in expressions]
    for text in whole:
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(
                f"`{key}` in {CONFIG_FILE} is no regular expression, {text[:80]!r}: {error}"
            ) from error
    if all(_PLAIN.fullmatch(text) for text in expressions):
        return [{name for name in names if re.fullmatch(text, name)} for text in whole]
    try:
        matcher = [sys.executable, "-I", "-S", "-c", _MATCHER]
        given = json.dumps([whole, names])
        ended = subprocess.run(matcher, input=given, capture_output=True, text=True, check=True, timeout=_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise CheckpointError(
            f"`{key}` in {CONFIG_FILE} could not be matched in {_SECONDS} seconds ({type(error).__name__}): write the "
            "names of the modules in place of the regular expression."
        ) from error
    return [set(found) for found in json.loads(ended.stdout)]
