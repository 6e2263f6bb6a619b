"""Files from outside, read as data and doubted; files of ours, written so that a broken run leaves the old ones."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors

from gemma2_keras.errors import CheckpointError

# Far above any honest configuration or index file.
LARGEST_JSON = 64 * 2**20
# What safetensors calls the dtypes that weights may have.
TENSOR_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# How the hidden folders end that a save writes into, and that it moves the old one to.
_NEW, _OLD = ".saving", ".old"


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


@contextlib.contextmanager
def replacing_folder(
    folder: str | os.PathLike, marker: str, replaced: Callable[[str], bool], kind: str = "preset"
) -> Iterator[Path]:
    """Write a whole folder beside `folder`, then put it in its place; on any error the old one stays as it was.

    Of several that write to one folder at a time the last takes it. What a killed one has left is put in order first.

    Args:
        folder: where the result shall stand. What is there may be replaced if it is empty or holds a file `marker`.
        marker: name of a file that tells a folder of ours.
        replaced: tells by its name whether an entry of the old folder goes; all others stay.
        kind: what is saved, for the error message.

    Yields:
        A new, empty folder to write into.

    Raises:
        FileExistsError: if something else stands at `folder`.
    """
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise TypeError(f"The folder to save to must be a path; given {folder!r}.")
    target = Path(os.path.abspath(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}{_NEW}"
    with contextlib.ExitStack() as held:
        with _alone_in(target.parent):
            _require_ours(target, marker, kind)
            _complete(target, replaced)
            for left in _left_beside(target, _NEW):
                # Who still writes it holds it.
                with _alone_in(left, wait=False) as ended:
                    if ended:
                        shutil.rmtree(left)
            beside.mkdir()
            held.enter_context(_alone_in(beside))
        try:
            yield beside
            for path in beside.iterdir():
                # As readable as the folder; safetensors writes for its owner alone.
                path.chmod(beside.stat().st_mode & 0o666)
                _flush(path)
            _flush(beside)
            with _alone_in(target.parent):
                # Another may have stood up meanwhile.
                _require_ours(target, marker, kind)
                _exchange(target, beside)
                _complete(target, replaced)
                _flush(target.parent)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise


def check_place(folder: str | os.PathLike, marker: str, kind: str = "preset") -> None:
    """See to it, before the work whose result it shall hold, that `replacing_folder` can write a folder.

    Args:
        folder: as `replacing_folder` takes it, which takes `marker` and `kind` as well.
        marker: name of a file that tells a folder of ours.
        kind: what is saved, for the error message.

    Raises:
        FileExistsError: if something else stands at `folder`.
        OSError: if nothing can be written beside it.
    """
    target = Path(os.path.abspath(folder))
    _require_ours(target, marker, kind)
    check_writable(target.parent)


def check_writable(folder: Path) -> None:
    """Make a folder, if it is not there, and see to it that it can be written to.

    Raises:
        OSError: if it cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Permissions, read-only disks and quotas each have rules of their own: only writing tells.
    with tempfile.TemporaryFile(dir=folder):
        pass


def restore_folder(folder: Path) -> None:
    """Bring back a folder that is missing because a save was killed between taking the old one away and its end.

    Raises:
        OSError: if it may not be moved.
    """
    target = Path(os.path.abspath(folder))
    if not os.path.lexists(target) and _left_beside(target, _OLD):
        with _alone_in(target.parent):
            _take_place(target)


def _require_ours(target: Path, marker: str, kind: str) -> None:
    if target.is_symlink() or target.exists():
        ours = (
            target.is_dir() and not target.is_symlink() and ((target / marker).is_file() or not any(target.iterdir()))
        )
        if not ours:
            raise FileExistsError(f"{target} exists and is no saved {kind}: choose another folder, or remove it first.")


def _exchange(target: Path, beside: Path) -> None:
    """Put a new folder in the place of the old one, which then lies beside."""
    old = beside.with_suffix(_OLD)
    try:
        if target.exists():
            target.rename(old)
        beside.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def _take_place(target: Path) -> None:
    """Where an exchange took the old folder away and went no further, put the new one there, which was whole."""
    for old in _left_beside(target, _OLD):
        new = old.with_suffix(_NEW)
        if not os.path.lexists(target):
            (new if new.is_dir() else old).rename(target)


def _complete(target: Path, replaced: Callable[[str], bool]) -> None:
    """Bring an exchange to its end, wherever it was left."""
    _take_place(target)
    for old in _left_beside(target, _OLD):
        # What the user keeps in the folder beside our files stays there.
        for path in old.iterdir():
            if not replaced(path.name) and not os.path.lexists(target / path.name):
                path.rename(target / path.name)
        shutil.rmtree(old)


def _left_beside(target: Path, suffix: str) -> list[Path]:
    """Folders that exchanges with `target` use, or have left."""
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}{suffix}")) if target.name else []


@contextlib.contextmanager
def _alone_in(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Keep others who ask out of a folder, until the end of this, or of the process.

    Args:
        folder: to be alone in.
        wait: whether to wait for one who is there.

    Yields:
        Whether that was possible; file systems without locks, and Windows, do not.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield lock(descriptor, wait) is True
    finally:
        os.close(descriptor)


def lock(descriptor: int, wait: bool = True) -> bool | None:
    """Keep others who ask away from what is open, until it is closed, or the process ends.

    Args:
        descriptor: of a file or folder.
        wait: whether to wait for one who has it.

    Returns:
        Whether it is kept now; `None` where nobody can be kept away, as on file systems without locks and on Windows.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, keys sorted, for people to read."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
