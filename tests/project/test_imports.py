"""Importing the package is cheap, and only kernels know a backend."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gemma2_keras

pytestmark = pytest.mark.once

BACKENDS = {"jax", "jaxlib", "tensorflow", "torch"}
PACKAGE = Path(gemma2_keras.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts)


def test_import_loads_no_framework() -> None:
    code = "import gemma2_keras, json, sys; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(result.stdout)}
    assert "gemma2_keras" in loaded
    assert not loaded & {"keras", "keras_hub", *BACKENDS}


@pytest.mark.parametrize("name", gemma2_keras.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(gemma2_keras, name) is not None
    assert name in dir(gemma2_keras)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = gemma2_keras.no_such_name


def _imports_outside_functions(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            yield child.module or ""
        else:
            yield from _imports_outside_functions(child)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_backend_at_module_level(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {name.partition(".")[0] for name in _imports_outside_functions(tree)} & BACKENDS


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch.nn as nn", ["torch.nn"]),
        ("from jax import numpy", ["jax"]),
        ("try:\n    import tensorflow\nexcept ImportError:\n    pass", ["tensorflow"]),
        ("class A:\n    import jax", ["jax"]),
        ("def f():\n    import jax", []),
        ("if typing.TYPE_CHECKING:\n    import jax", []),
        ("from .torch import x", []),
    ],
)
def test_what_counts_as_module_level(code: str, found: list[str]) -> None:
    assert list(_imports_outside_functions(ast.parse(code))) == found
