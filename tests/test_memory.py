from __future__ import annotations

import builtins
import os
import sys

import numpy as np
import pytest

from gemma2_keras import memory

pytestmark = pytest.mark.once


def test_what_is_available_is_less_than_there_is():
    available = memory.available_bytes()
    if available is None:
        pytest.skip("this system does not say")
    assert 2**20 < available < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_the_peak_is_in_bytes_and_stays():
    held = np.ones(50_000_000, "uint8")
    peak = memory.peak_bytes()
    if peak is None:
        pytest.skip("this system does not say")
    assert peak > held.nbytes
    del held
    assert memory.peak_bytes() >= peak
    # Counted in kilobytes on Linux and in bytes on a Mac.
    assert peak < 2**42


def test_a_system_that_does_not_say_gives_nothing(monkeypatch):
    def missing(*_args, **_kwargs):
        raise OSError

    monkeypatch.setattr(builtins, "open", missing)
    pages = memory.available_bytes()
    assert pages is None or pages > 0
    monkeypatch.setattr(os, "sysconf", missing)
    assert memory.available_bytes() is None
    monkeypatch.delattr(os, "sysconf")
    assert memory.available_bytes() is None
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory.peak_bytes() is None


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 1\ninactive_file 50\n"}, 350),
        ({"memory.max": "1000", "memory.current": "1200", "memory.stat": "anon 1\n"}, 0),
        ({"memory.max": "max", "memory.current": "700", "memory.stat": "inactive_file 50\n"}, None),
        ({"memory.max": "1000"}, None),
        ({}, None),
    ],
)
def test_a_container_has_what_its_limit_leaves(monkeypatch, tmp_path, files, left):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    places = (str(tmp_path / "memory.max"), str(tmp_path / "memory.current"), "inactive_file")
    monkeypatch.setattr(memory, "_LIMITS", (places,))
    assert memory._left_to_container() == left
    available = memory.available_bytes()
    assert available == left if left is not None else available is None or available > 2**20
