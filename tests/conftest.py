"""What holds for every test: seeds, few threads, no windows, property tests without deadlines."""

from __future__ import annotations

import os
import signal

# Before anything reads them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import keras
import pytest

# A suite that a shell runs in the background starts with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The first example of a shape compiles; only later ones are quick.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def _seed() -> None:
    keras.utils.set_random_seed(0)
