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
