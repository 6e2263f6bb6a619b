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
# Gemma's has 4 MB.
LARGEST_VOCABULARY = 256 * 2**20
# Names out of foreign files are cut there in messages.
_LONGEST_NAME = 80
_LONGEST_FILE_NAME = 255


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
    plain = isinstance(name, str) and name.isprintable() and name not in ("", ".", "..")
    if not plain or len(name) > _LONGEST_FILE_NAME or any(c in name for c in "/\\:"):
        raise CheckpointError(f"{folder} names {shown(name)} as one of its files, which is no plain file name.")
    return path_inside(folder, name)


def path_inside(folder: Path, name: str) -> Path:
    """The path of what lies in a folder or below it, if no link leads out.

    Raises:
        CheckpointError: if one does, or leads to itself.
    """
    path = folder / name
    # The cache of Hugging Face keeps the files of a repository beside its revisions, and links to them.
    allowed = (folder, folder.parent.parent / "blobs") if folder.parent.name == "snapshots" else (folder,)
    try:
        inside = any(path.resolve().is_relative_to(place.resolve()) for place in allowed)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is a link that leads to itself: put the file there.") from error
    if not inside:
        raise CheckpointError(f"{path} is a link that leads out of its folder: put the file itself there.")
    return path


def read_vocabulary(path: Path) -> bytes | None:
    """The bytes of a SentencePiece model; `None` if there is no such file.

    Raises:
        CheckpointError: if it is no regular file, or larger than any vocabulary.
    """
    if not path.exists():
        return None
    try:
        if not path.is_file():
            raise OSError("no regular file")
        if path.stat().st_size > LARGEST_VOCABULARY:
            raise OSError(f"{path.stat().st_size} bytes, more than a vocabulary has")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read as a SentencePiece model: {error}.") from error


def shown(value: Any) -> str:
    """A value out of a foreign file for an error message, cut short.

    >>> shown("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa…"
    """
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)}"
    try:
        text = repr(value.item() if isinstance(value, np.generic) else value)
    except RecursionError:
        return "nested without end"
    return text if len(text) <= 64 else f"{text[:60]}…"


def some(names: Iterable[str], most: int = 3) -> str:
    """The first of the names, and how many more there are, for an error message.

    >>> some(["d", "c", "b", "a"], most=2)
    "'a', 'b' and 2 more"
    """
    ordered = sorted(name[:_LONGEST_NAME] for name in names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(map(repr, ordered[:most])) + more
