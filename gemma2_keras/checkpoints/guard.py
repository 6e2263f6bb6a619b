"""Files from outside, read as data and doubted."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_keras.errors import CheckpointError

# Far above any honest configuration or index file.
LARGEST_JSON = 64 * 2**20
# Names out of foreign files are cut there in messages.
_LONGEST_NAME = 80


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
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}.") from error
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object from a text.

    Raises:
        ValueError: if it is broken, no object, nested without end, or has a key twice.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_no_key_twice, parse_constant=_finite_number, parse_float=_finite_number
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__} where a JSON object belongs")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice[:_LONGEST_NAME]!r} stands twice")
    return value


def _finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def file_inside(folder: Path, name: Any) -> Path:
    """The path of a file of a folder, by a name that may come from another file.

    Raises:
        CheckpointError: if `name` is no plain file name, or a link that leads out of the folder.
    """
    if (
        not isinstance(name, str)
        or not name
        or name in (".", "..")
        or any(c in name for c in "/\\:")
        or not name.isprintable()
    ):
        raise CheckpointError(f"{folder} names {shown(name)} as one of its files, which is no plain file name.")
    path = folder / name
    if path.is_symlink():
        # The cache of Hugging Face keeps the files of a repository beside its revisions, and links to them.
        allowed = (folder, folder.parent.parent / "blobs") if folder.parent.name == "snapshots" else (folder,)
        if not any(path.resolve().is_relative_to(place.resolve()) for place in allowed):
            raise CheckpointError(f"{path} is a link that leads out of its folder: put the file itself there.")
    return path


def shown(value: Any) -> str:
    """A value out of a foreign file for an error message, cut short.

    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…"
    """
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)}"
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 64 else f"{text[:60]}…"


def some(names: Iterable[str], most: int = 3) -> str:
    """The first of the names, and how many more there are, for an error message.

    >>> some(["d", "c", "b", "a"], most=2)
    "'a', 'b' and 2 more"
    """
    ordered = sorted(name[:_LONGEST_NAME] for name in names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(map(repr, ordered[:most])) + more
