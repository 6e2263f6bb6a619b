"""The architecture in a GGUF file: hyperparameters as keys, and keys as hyperparameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from gemma2_keras.checkpoints.guard import shown
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import CheckpointError, warn

ARCHITECTURE = "gemma2"
# Their key, behind the architecture's name -> our hyperparameter.
_WHOLE = {
    "context_length": "context_length",
    "embedding_length": "hidden_dim",
    "block_count": "num_layers",
    "feed_forward_length": "intermediate_dim",
    "attention.head_count": "num_query_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window_size",
}
# The same for numbers that the format keeps as float32, with what llama.cpp takes where one is absent.
_REAL: dict[str, tuple[str, float | None]] = {
    "attention.layer_norm_rms_epsilon": ("layer_norm_epsilon", None),
    "attn_logit_softcapping": ("attention_logit_soft_cap", 50.0),
    "final_logit_softcapping": ("final_logit_soft_cap", 30.0),
    "rope.freq_base": ("rope_max_wavelength", 10_000.0),
}
# llama.cpp always caps. This cap changes no float32 below 2**50: dividing by it is exact, and tanh(x) is x near zero.
_NO_CAP = 2.0**64
# llama.cpp has no key for the scale of attention scores: it is the head size's power of -1/2, and in models of as many
# layers as the 27B one, that of width / heads. But rotated queries and keys are both multiplied by this.
_ROTATED_FACTOR, _LAYERS_OF_27B = "rope.scaling.attn_factor", 46

# Keys of ours, for what the format rounds: a hyperparameter as float64, and what adding 1 to a norm's weights lost.
OWN, REMAINDER = "gemma2_keras.", "gemma2_keras.remainder."


def describe_architecture(config: Gemma2Config) -> dict[str, np.generic]:
    """The keys of a file that hold the architecture, as NumPy scalars of the types that they have there.

    Raises:
        ValueError: if a hyperparameter is outside what the format holds.

    Warns:
        UserWarning: if some programs cannot follow `query_pre_attention_scalar`.

    >>> keys = describe_architecture(Gemma2Config(64, 1, 4, 2, 24, 40, 8, final_logit_soft_cap=0.3))
    >>> keys["gemma2.attention.key_length"], keys["gemma2.final_logit_softcapping"]
    (np.uint32(8), np.float32(0.3))
    """
    keys: dict[str, np.generic] = {}
    for key, name in _WHOLE.items():
        value = getattr(config, name)
        if value >= 2**31:
            raise ValueError(f"`{name}` must be below 2**31 in a GGUF file; it is {value}.")
        keys[f"{ARCHITECTURE}.{key}"] = np.uint32(value)
    keys[f"{ARCHITECTURE}.attention.value_length"] = np.uint32(config.head_dim)
    for key, (name, _) in _REAL.items():
        value = getattr(config, name)
        exact = math.inf if value is None else float(value)
        keys[f"{ARCHITECTURE}.{key}"] = kept = _kept(exact)
        if not 0 < kept < math.inf:
            raise ValueError(f"`{name}` is {value}, beyond float32, as which a GGUF file keeps it.")
        if _shortest(kept) != exact:
            keys[OWN + name] = np.float64(exact)
    scalar = config.query_pre_attention_scalar
    assert scalar is not None
    expected = _expected_scalar(config.num_layers, config.hidden_dim, config.num_query_heads, config.head_dim)
    if scalar != expected:
        factor = _rotated_factor(scalar, expected)
        if not 0 < factor < math.inf:
            raise ValueError(f"`query_pre_attention_scalar` is {scalar}, which no GGUF file can hold.")
        keys[f"{ARCHITECTURE}.{_ROTATED_FACTOR}"] = factor
        keys[f"{OWN}query_pre_attention_scalar"] = np.float64(scalar)
        warn(
            f"`query_pre_attention_scalar` is {scalar}, and GGUF has no key for it: programs take {expected} for Gemma "
            f"2 of this size. The key {ARCHITECTURE}.{_ROTATED_FACTOR} makes up for it in llama.cpp; a program that "
            "does not read that key, such as Ollama's own engine, computes other attention scores."
        )
    return keys


def _kept(value: float) -> np.float32:
    """A number as the format keeps it."""
    with np.errstate(over="ignore", under="ignore"):
        return np.float32(_NO_CAP if value == math.inf else value)


def _shortest(value: np.float32) -> float:
    """The number with the fewest digits that is kept so: 1e-6 rather than 9.99999997e-07."""
    return float(str(value))


def _expected_scalar(num_layers: int, hidden_dim: int, num_query_heads: int, head_dim: int) -> int:
    return hidden_dim // num_query_heads if num_layers == _LAYERS_OF_27B else head_dim


def _rotated_factor(scalar: float, expected: float) -> np.float32:
    # It counts twice, once with the query and once with the key.
    with np.errstate(over="ignore", under="ignore"):
        return np.float32((expected / scalar) ** 0.25)


def parse_architecture(keys: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Gemma2Config:
    """Keys of a file as hyperparameters; refuses what would change the mathematics.

    Args:
        keys: as `read_container` gives them.
        shapes: of the tensors, by name; the embedding's tells the size of the vocabulary.

    Raises:
        CheckpointError: names the key that is missing, unknown or has a value that is not implemented.
    """
    for key, only in (("general.architecture", ARCHITECTURE), ("general.type", "model")):
        value = keys.get(key, only if key == "general.type" else None)
        if not isinstance(value, str) or value != only:
            raise CheckpointError(f'`{key}` is {shown(value)}; only "{only}" is read here.')
    found = {key.removeprefix(f"{ARCHITECTURE}."): v for key, v in keys.items() if key.startswith(f"{ARCHITECTURE}.")}
    own = {key.removeprefix(OWN): v for key, v in keys.items() if key.startswith(OWN) and not key.startswith(REMAINDER)}
    hyperparameters: dict[str, Any] = {}
    for key, name in _WHOLE.items():
        value = found.pop(key, np.uint32(4096) if key == "attention.sliding_window" else None)
        if not isinstance(value, np.integer) or value < 1:
            raise CheckpointError(f"`{ARCHITECTURE}.{key}` is {shown(value)}; it must be a whole number above 0.")
        hyperparameters[name] = int(value)
    for key, (name, default) in _REAL.items():
        value = found.pop(key, None if default is None else np.float32(default))
        if not _is(value, "float32") or not 0 < value < math.inf:
            raise CheckpointError(f"`{ARCHITECTURE}.{key}` is {shown(value)}; it must be a float32 above 0.")
        exact = _own_number(own, name, _shortest(value))
        if _kept(exact) != value:
            raise CheckpointError(f"`{ARCHITECTURE}.{key}` is {shown(value)}, but `{OWN}{name}` {exact}.")
        hyperparameters[name] = None if exact == math.inf and name.endswith("soft_cap") else exact
    sizes = (hyperparameters[name] for name in ("num_layers", "hidden_dim", "num_query_heads", "head_dim"))
    expected = _expected_scalar(*sizes)
    scalar = _own_number(own, "query_pre_attention_scalar", expected or 1)
    factor = found.pop(_ROTATED_FACTOR, np.float32(1))
    if not _is(factor, "float32") or factor != _rotated_factor(scalar, expected):
        raise CheckpointError(
            f"`{ARCHITECTURE}.{_ROTATED_FACTOR}` is {shown(factor)}, which is not implemented but for files of ours."
        )
    hyperparameters["query_pre_attention_scalar"] = scalar
    if own:
        raise CheckpointError(f"The file has {shown(OWN + min(own))}: install a newer gemma2-keras.")
    if hyperparameters["num_layers"] > len(shapes):
        raise CheckpointError(
            f"The file has {len(shapes)} tensors, too few for the {hyperparameters['num_layers']} layers of its keys."
        )
    rows = shapes.get("token_embd.weight", (1,))[0]
    _require_implemented(found, {**hyperparameters, "vocabulary_size": rows})
    try:
        return Gemma2Config(**hyperparameters, vocabulary_size=rows)
    except ValueError as error:
        raise CheckpointError(f"The keys of the file describe no Gemma 2 model: {error}") from error


def _is(value: Any, dtype: str) -> bool:
    return isinstance(value, np.generic) and value.dtype == dtype


def _own_number(own: dict[str, Any], name: str, otherwise: float) -> float:
    value = own.pop(name, np.float64(otherwise))
    if not _is(value, "float64") or not value > 0:
        raise CheckpointError(f"`{OWN}{name}` is {shown(value)}; it must be a float64 above 0.")
    return float(value)


def _require_implemented(found: dict[str, Any], hyperparameters: dict[str, Any]) -> None:
    """Refuse keys of the architecture that say something else than what is computed, or that are not known."""
    head_dim, layers = hyperparameters["head_dim"], hyperparameters["num_layers"]
    allowed = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": hyperparameters["vocabulary_size"],
        "rope.freq_base_swa": _kept(hyperparameters["rope_max_wavelength"]),
        "rope.scaling.type": "none",
        "attention.causal": True,
        "attention.sliding_window_pattern": 2,
    }
    for key, value in found.items():
        if isinstance(value, np.ndarray) and key == "attention.sliding_window_pattern":
            known = value.dtype == bool and np.array_equal(value, np.arange(layers) % 2 == 0)
        else:
            known = key in allowed and isinstance(value, np.generic | str) and value == allowed[key]
        if not known:
            raise CheckpointError(f"`{ARCHITECTURE}.{key[:80]}` is {shown(value)}, which is not implemented.")
