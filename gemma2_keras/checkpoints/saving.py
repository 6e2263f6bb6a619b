"""Files and folders of ours, written so that a run that breaks at any moment leaves the old ones."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# How the hidden folders end that a save writes into, and that it moves the old one to; and hidden files.
_NEW, _OLD, _NEW_FILE = ".saving", ".old", ".writing"


@contextlib.contextmanager
def replacing_folder(
    folder: str | os.PathLike, marker: str, replaced: Callable[[str], bool], kind: str = "preset"
) -> Iterator[Path]:
    """Write a whole folder beside `folder`, then put it in its place; on any error the old one stays as it was.

    Of several that write to one folder at a time the last takes it. What a killed one has left is put in order first.

    Args:
        folder: where the result shall stand. What is there may be replaced if it is empty or holds a file `marker`.
        marker: name of a file that tells a folder of ours.
        replaced: tells by its name whether a file of the old folder goes; all others stay. Of a folder it is asked with
            a slash behind the name whether such files are in it, whose names then have the folder's before.
        kind: what is saved, for the error message.

    Yields:
        A new, empty folder to write into.

    Raises:
        FileExistsError: if something else stands at `folder`.
    """
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise TypeError(f"The folder to save to must be a path; given {folder!r}.")
    target = Path(os.path.abspath(os.path.expanduser(folder)))
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
            for path in beside.rglob("*"):
                if path.is_file():
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
        except BaseException as error:
            shutil.rmtree(beside, ignore_errors=True)
            _name(error, target)
            raise


@contextlib.contextmanager
def replacing_file(path: str | os.PathLike, ours: Callable[[Path], bool], kind: str) -> Iterator[Path]:
    """Write a whole file beside `path`, then put it in its place; on any error the old one stays as it was.

    Of several that write to one path at a time the last takes it. What a killed one has left is removed first.

    Args:
        path: where the result shall stand. What is there may be replaced if it is an empty file or `ours`.
        ours: tells of a file whether it is of the kind that may be replaced.
        kind: what is written, for the error message, as in "a GGUF file".

    Yields:
        The path of a new, empty file to write.

    Raises:
        FileExistsError: if something else stands at `path`.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise TypeError(f"The file to write must be a path; given {path!r}.")
    target = Path(os.path.abspath(os.path.expanduser(path)))
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}{_NEW_FILE}"
    with contextlib.ExitStack() as held:
        with _alone_in(target.parent):
            _require_own_file(target, ours, kind)
            for left in _left_beside(target, _NEW_FILE):
                # Who still writes it holds it.
                with _alone_in(left, wait=False) as ended:
                    if ended:
                        left.unlink()
            beside.touch()
            held.enter_context(_alone_in(beside))
        try:
            yield beside
            _flush(beside)
            with _alone_in(target.parent):
                # Another may have stood up meanwhile.
                _require_own_file(target, ours, kind)
                beside.replace(target)
                _flush(target.parent)
        except BaseException as error:
            beside.unlink(missing_ok=True)
            _name(error, target)
            raise


def _name(error: BaseException, target: Path) -> None:
    """Let an error of the system that names no file, such as that the disk is full, say what was to be written."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(target)


def _require_own_file(target: Path, ours: Callable[[Path], bool], kind: str) -> None:
    if os.path.lexists(target):
        regular = target.is_file() and not target.is_symlink()
        if not regular or (target.stat().st_size and not ours(target)):
            raise FileExistsError(f"{target} exists and is not {kind}: choose another path, or remove it first.")


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
    target = Path(os.path.abspath(os.path.expanduser(folder)))
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
    target = Path(os.path.abspath(os.path.expanduser(folder)))
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
        _keep(old, target, replaced)
        shutil.rmtree(old)


def _keep(old: Path, target: Path, replaced: Callable[[str], bool], within: str = "") -> None:
    """Move into a folder what is not replaced of an old one, nor there already."""
    for path in old.iterdir():
        name = within + path.name
        if path.is_dir() and not path.is_symlink() and replaced(f"{name}/"):
            _keep(path, target / path.name, replaced, f"{name}/")
        elif not replaced(name) and not os.path.lexists(target / path.name):
            target.mkdir(parents=True, exist_ok=True)
            path.rename(target / path.name)


def _left_beside(target: Path, suffix: str) -> list[Path]:
    """Folders and files that writers of `target` use, or have left."""
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
