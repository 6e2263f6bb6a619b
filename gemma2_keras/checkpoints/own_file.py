"""The file of our own in a preset folder, for what transformers has no place for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma2_keras.checkpoints.guard import file_inside, read_json, shown, some
from gemma2_keras.errors import CheckpointError

OWN_FILE = "gemma2_keras.json"
# Its key for whether an adapter lies beside the weights.
HAS_ADAPTER = "adapter"
FORMAT = 1
TOKENIZER_SETTINGS = {"parse_special": bool}
PREPROCESSOR_SETTINGS = {"sequence_length": int, "add_start_token": bool, "add_end_token": bool}
_PARTS = {"tokenizer": TOKENIZER_SETTINGS, "preprocessor": PREPROCESSOR_SETTINGS}


def own_settings(folder: Path) -> dict[str, Any]:
    """Our own file of a preset folder, checked; empty for a folder that we did not write."""
    path = file_inside(folder, OWN_FILE)
    if not path.exists():
        return {}
    own = read_json(path)
    if own.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {shown(own.get('format'))}; this version reads {FORMAT}. Install a newer gemma2-keras."
        )
    for part, types in _PARTS.items():
        value = own.get(part, {})
        if not isinstance(value, dict) or not set(value) <= set(types):
            raise CheckpointError(
                f"`{part}` in {path} must be an object with keys among {sorted(types)}; it is {shown(value)}."
            )
        for key, setting in value.items():
            if type(setting) is not types[key]:
                raise CheckpointError(
                    f"`{key}` in {path} must be of type {types[key].__name__}; it is {shown(setting)}."
                )
    dropout = own.get("dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise CheckpointError(f"`dropout` in {path} must be at least 0 and below 1; it is {shown(dropout)}.")
    if not isinstance(own.get(HAS_ADAPTER, False), bool):
        raise CheckpointError(f"`{HAS_ADAPTER}` in {path} must be true or false; it is {shown(own[HAS_ADAPTER])}.")
    unknown = set(own) - {"format", "dropout", HAS_ADAPTER, *_PARTS}
    if unknown:
        raise CheckpointError(f"{path} has unknown keys: {some(unknown)}.")
    return own
