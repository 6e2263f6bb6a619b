"""Sizes of this process and of this machine. Imports no Keras."""

from __future__ import annotations

import os
import sys


def available_bytes() -> int | None:
    """Memory that programs can still get without others being pushed out; `None` where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def peak_bytes() -> int | None:
    """The most memory that this process has held at once; `None` where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
