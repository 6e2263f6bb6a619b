"""What is in the wheel, and what is not."""

from __future__ import annotations

import importlib.resources
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _preset_files() -> set[str]:
    files = (path.relative_to(ROOT / "presets") for path in (ROOT / "presets").rglob("*") if path.is_file())
    return {path.as_posix() for path in files if not any(part.startswith((".", "__pycache__")) for part in path.parts)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in the wheel, built from a copy since a build writes beside its source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, source, ignore=left_out, dirs_exist_ok=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_every_package_is_listed() -> None:
    found = {
        ".".join(path.relative_to(ROOT).parts[:-1])
        for path in (ROOT / "gemma2_keras").rglob("*.py")
        if "presets" not in path.parts
    }
    listed = set(SETTINGS["tool"]["setuptools"]["packages"])
    assert listed == found | {"gemma2_keras.presets"}, "bring `packages` in pyproject.toml up to date"


def test_every_module_is_in(wheel: set[str]) -> None:
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gemma2_keras").rglob("*.py")}
    assert modules <= wheel


def test_presets_are_in(wheel: set[str]) -> None:
    files = _preset_files()
    assert any(name.endswith(".json") for name in files)
    prefix = "gemma2_keras/presets/"
    assert {name.removeprefix(prefix) for name in wheel if name.startswith(prefix)} == files


def test_licence_is_in(wheel: set[str]) -> None:
    for name in ("LICENSE", "NOTICE"):
        assert any(entry.endswith(f".dist-info/licenses/{name}") for entry in wheel)


def test_nothing_else_is_in(wheel: set[str]) -> None:
    assert {name.partition("/")[0].rpartition(".")[2] for name in wheel} == {"gemma2_keras", "dist-info"}


def test_presets_are_readable_where_installed() -> None:
    presets = importlib.resources.files("gemma2_keras.presets")
    for name in sorted(_preset_files()):
        assert presets.joinpath(name).is_file()
