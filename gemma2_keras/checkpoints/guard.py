"""Files from outside, read as data and doubted."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors

from gemma2_keras.errors import CheckpointError

# Far above any honest configuration or index file.
LARGEST_JSON = 64 * 2**20
# What safetensors calls the dtypes that weights may have.
TENSOR_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: if there is no such file, it is too large, broken, no object, or has a key twice.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no regular file.")
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise CheckpointError(f"{path} has {size} bytes, too many for a {path.name}.")
        text = path.read_text(encoding="utf-8")
        value = json.loads(
            text, object_pairs_hook=_no_key_twice, parse_constant=_finite_number, parse_float=_finite_number
        )
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}.") from error
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} where a JSON object belongs.")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return value


def _finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def file_inside(folder: Path, name: Any) -> Path:
    """The path of a file that another file names.

    Raises:
        CheckpointError: if `name` is no plain file name.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or any(c in name for c in "/\\\0:"):
        raise CheckpointError(f"{folder} names {name!r} as a file of weights, which is no plain file name.")
    return folder / name


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, opened for reading NumPy arrays.

    Raises:
        CheckpointError: if there is no such file, or it is truncated or broken.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("no regular file")
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} lacks the file {path.name}.") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or broken ({error}). Copy or download the file again.") from error


def some(names: Iterable[str], most: int = 3) -> str:
    """The first of the names, and how many more there are, for an error message.

    >>> some(["d", "c", "b", "a"], most=2)
    "'a', 'b' and 2 more"
    """
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(map(repr, ordered[:most])) + more
