from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gemma2_keras.checkpoints.guard import read_json
from gemma2_keras.checkpoints.saving import replacing_file, replacing_folder, restore_folder, write_json

pytestmark = pytest.mark.once
REPOSITORY = Path(__file__).resolve().parents[2]


def write(folder, content: str = "new") -> None:
    with replacing_folder(folder, "marker", lambda name: True) as beside:
        (beside / "marker").write_text(content)


def test_a_folder_is_made_with_its_parents_and_nothing_is_left_beside(tmp_path):
    write(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "marker").read_text() == "new"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
def test_the_folder_is_as_readable_as_any_other(tmp_path, umask):
    before = os.umask(umask)
    try:
        write(tmp_path / "saved")
        assert stat.S_IMODE((tmp_path / "saved").stat().st_mode) == 0o777 & ~umask
    finally:
        os.umask(before)


def test_an_earlier_folder_of_ours_and_an_empty_one_are_replaced(tmp_path):
    (tmp_path / "saved").mkdir()
    write(tmp_path / "saved", "first")
    (tmp_path / "saved" / "more").write_text("old")
    write(str(tmp_path / "saved"), "second")
    assert [(path.name, path.read_text()) for path in (tmp_path / "saved").iterdir()] == [("marker", "second")]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_leaves_the_old_folder_and_nothing_beside(tmp_path, error):
    write(tmp_path / "saved", "old")

    def write_half() -> None:
        with replacing_folder(tmp_path / "saved", "marker", lambda name: True) as beside:
            (beside / "marker").write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert (tmp_path / "saved" / "marker").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_an_error_of_the_last_renaming_puts_the_old_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "saved", "old")
    rename = Path.rename

    def fail_on_new(self, target):
        if Path(target).name == "saved" and (self / "marker").read_text() == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_on_new)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "saved")
    assert (tmp_path / "saved" / "marker").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def _folder_of_another(path):
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def _symlink(path):
    write(path.with_name("real"))
    path.symlink_to(path.with_name("real"))


@pytest.mark.parametrize("make", [_folder_of_another, lambda path: path.write_text("mine"), _symlink])
def test_what_is_not_ours_is_refused_and_left_alone(tmp_path, make):
    make(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="exists and is no saved preset: choose another folder"):
        write(tmp_path / "saved")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("moment", ["writing", "flushing"])
def test_a_killed_process_leaves_the_old_folder(tmp_path, moment):
    write(tmp_path / "saved", "old")
    script = f"""
        import os
        from gemma2_keras.checkpoints import saving
        if {moment!r} == "flushing":
            saving._flush = lambda path: os._exit(9)
        with saving.replacing_folder({str(tmp_path / "saved")!r}, "marker", lambda name: True) as beside:
            (beside / "marker").write_text("half")
            if {moment!r} == "writing":
                os._exit(9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=REPOSITORY, timeout=60)
    assert done.returncode == 9
    assert (tmp_path / "saved" / "marker").read_text() == "old"
    # And the next one succeeds.
    write(tmp_path / "saved", "next")
    assert (tmp_path / "saved" / "marker").read_text() == "next"


# Kills at any step: of the system calls that change folders, the process does so many, and no more.
KILLED = """
import os, sys
from pathlib import Path
from gemma2_keras.checkpoints import saving

folder, steps = sys.argv[1], int(sys.argv[2])

def counted(function):
    def call(*arguments, **options):
        global steps
        if steps == 0:
            os._exit(9)
        steps -= 1
        return function(*arguments, **options)
    return call

saving._flush = counted(saving._flush)
Path.rename = counted(Path.rename)
saving.shutil.rmtree = counted(saving.shutil.rmtree)
with saving.replacing_folder(folder, "marker", lambda name: name != "notes") as beside:
    (beside / "marker").write_text("new")
"""


def killed_after(steps: int, folder: Path) -> int:
    arguments = [sys.executable, "-c", KILLED, str(folder), str(steps)]
    return subprocess.run(arguments, cwd=REPOSITORY, timeout=60).returncode


# The file and its folder are flushed; old away, new in its place, notes back, old removed; the parent is flushed.
@pytest.mark.parametrize("steps", range(7))
@pytest.mark.parametrize("then", ["load", "save", "load and save"])
def test_whatever_a_kill_leaves_is_put_in_order(tmp_path, steps, then):
    target = tmp_path / "sa[v]ed"
    write(target, "old")
    (target / "notes").write_text("mine")
    assert killed_after(steps, target) == 9
    if "load" in then:
        restore_folder(target)
        assert (target / "marker").read_text() == ("old" if steps < 3 else "new")
    if "save" in then:
        with replacing_folder(target, "marker", lambda name: name != "notes") as beside:
            (beside / "marker").write_text("next")
        assert {path.name: path.read_text() for path in target.iterdir()} == {"marker": "next", "notes": "mine"}
        assert [path.name for path in tmp_path.iterdir()] == ["sa[v]ed"]


def test_what_others_are_writing_is_left_alone(tmp_path):
    with replacing_folder(tmp_path / "saved", "marker", lambda name: True) as slow:
        (slow / "marker").write_text("slow")
        write(tmp_path / "saved", "quick")
        # Of another folder, or made by hand.
        (tmp_path / ".saved.more.0123abcd.saving").mkdir()
        (tmp_path / ".saved.keep").mkdir()
        assert slow.is_dir()
        restore_folder(tmp_path / "saved")
        assert (tmp_path / "saved" / "marker").read_text() == "quick"
    # The last one wins.
    assert (tmp_path / "saved" / "marker").read_text() == "slow"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"saved", ".saved.more.0123abcd.saving", ".saved.keep"}


def test_many_who_save_to_one_folder_leave_one_whole_folder(tmp_path):
    def save(content: str) -> None:
        with replacing_folder(tmp_path / "saved", "marker", lambda name: True) as beside:
            (beside / "other").write_text(content)
            (beside / "marker").write_text(content)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, map(str, range(40))))
    found = {path.name: path.read_text() for path in (tmp_path / "saved").iterdir()}
    assert set(found) == {"marker", "other"}
    assert len(set(found.values())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_what_was_put_there_meanwhile_is_refused_and_left_alone(tmp_path):
    def save() -> None:
        with replacing_folder(tmp_path / "saved", "marker", lambda name: True) as beside:
            (beside / "marker").write_text("new")
            _folder_of_another(tmp_path / "saved")

    with pytest.raises(FileExistsError, match="is no saved preset"):
        save()
    assert [path.name for path in tmp_path.rglob("*")] == ["saved", "thesis.txt"]


def test_without_locks_folders_are_saved_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    (tmp_path / ".saved.0123abcd.saving").mkdir()
    write(tmp_path / "saved", "old")
    write(tmp_path / "saved", "new")
    assert (tmp_path / "saved" / "marker").read_text() == "new"
    # Nobody knows whether it is still written.
    assert {path.name for path in tmp_path.iterdir()} == {"saved", ".saved.0123abcd.saving"}


def test_what_is_written_is_read(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"\u00e9": "日本"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


# Single files


def is_ours(path: Path) -> bool:
    return path.read_text().startswith("ours")


def write_file(path, content: str = "ours, new") -> None:
    with replacing_file(path, is_ours, "a file of ours") as beside:
        beside.write_text(content)


def test_a_file_is_made_with_its_parents_and_replaced(tmp_path):
    path = tmp_path / "a" / "b"
    write_file(path, "ours, first")
    write_file(str(path), "ours, second")
    assert path.read_text() == "ours, second"
    path.write_text("")
    write_file(path, "ours, third")
    assert path.read_text() == "ours, third"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
def test_the_file_is_as_readable_as_any_other(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_file(tmp_path / "x")
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask
    finally:
        os.umask(before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_error_leaves_the_old_file_and_nothing_beside(tmp_path, error):
    write_file(tmp_path / "x", "ours, old")

    def write_half() -> None:
        with replacing_file(tmp_path / "x", is_ours, "a file of ours") as beside:
            beside.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x": "ours, old"}


def _symlink_to_a_file(path):
    write_file(path.with_name("real"))
    path.symlink_to(path.with_name("real"))


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.write_text("mine"), _symlink_to_a_file])
def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path, make):
    make(tmp_path / "x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="exists and is not a file of ours: choose another path, or remove it"):
        write_file(tmp_path / "x")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_was_put_there_meanwhile_is_left_alone(tmp_path):
    def save() -> None:
        with replacing_file(tmp_path / "x", is_ours, "a file of ours") as beside:
            beside.write_text("ours")
            (tmp_path / "x").write_text("mine")

    with pytest.raises(FileExistsError, match="is not a file of ours"):
        save()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x": "mine"}


@pytest.mark.parametrize("path", [None, "", 5])
def test_a_file_without_a_path(path):
    with pytest.raises(TypeError, match="The file to write must be a path"):
        write_file(path)


@pytest.mark.parametrize("moment", ["writing", "flushing", "replacing", "replaced"])
def test_a_killed_process_leaves_the_old_file_or_the_new(tmp_path, moment):
    target = tmp_path / "sa[v]ed"
    write_file(target, "ours, old")
    script = f"""
        import os
        from pathlib import Path
        from gemma2_keras.checkpoints import saving
        die, flush, moment = lambda *arguments: os._exit(9), saving._flush, {moment!r}
        if moment == "flushing":
            saving._flush = die
        if moment == "replacing":
            Path.replace = die
        if moment == "replaced":
            saving._flush = lambda path: die() if path.is_dir() else flush(path)
        with saving.replacing_file({str(target)!r}, lambda path: True, "a file of ours") as beside:
            beside.write_text("ours, new")
            if moment == "writing":
                die()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=REPOSITORY, timeout=60)
    assert done.returncode == 9
    assert target.read_text() == ("ours, new" if moment == "replaced" else "ours, old")
    # And the next one clears up.
    write_file(target, "ours, next")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"sa[v]ed": "ours, next"}


def test_a_file_that_another_is_writing_is_left_alone(tmp_path):
    with replacing_file(tmp_path / "x", is_ours, "a file of ours") as slow:
        slow.write_text("ours, slow")
        write_file(tmp_path / "x", "ours, quick")
        # Of another file, or made by hand.
        (tmp_path / ".x.more.0123abcd.writing").touch()
        assert (tmp_path / "x").read_text() == "ours, quick"
    assert (tmp_path / "x").read_text() == "ours, slow"
    assert {path.name for path in tmp_path.iterdir()} == {"x", ".x.more.0123abcd.writing"}


def test_many_who_write_one_file_leave_one_whole_file(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_file(tmp_path / "x", f"ours, {i}" * 1000), range(40)))
    content = (tmp_path / "x").read_text()
    assert content == content[: len(content) // 1000] * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
