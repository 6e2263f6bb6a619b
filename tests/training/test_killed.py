"""A run that is killed at any moment shows the curve of one that is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma2_keras import TrainingHistory

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_run_is_the_same_run(tmp_path):
    # So that the attempts need not compile one after another.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "tests.training.killed", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **cache}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    curve = TrainingHistory.read(killed / "history.jsonl")
    assert len(curve.losses) == 15
    assert len(curve.history["val_perplexity"]) == 3
    # Not within a tolerance: the same numbers, of training and validation.
    assert (killed / "history.jsonl").read_text() == (whole / "history.jsonl").read_text()
    with np.load(whole / "weights.npz") as expected, np.load(killed / "weights.npz") as found:
        assert expected.files
        for name in expected.files:
            np.testing.assert_array_equal(found[name], expected[name])
    # Nothing is left of what was being written.
    for folder in (whole, killed):
        names = sorted(path.name for path in folder.iterdir() if path.name != ".lock")
        assert names[1:] == ["checkpoint-00000015", "history.jsonl", "weights.npz"]
        assert names[0] in ("checkpoint-00000013", "checkpoint-00000014")
