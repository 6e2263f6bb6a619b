"""Sizes of this process and of this machine. Imports no Keras."""

from __future__ import annotations

import os
import sys

# Where a container's limit and what is used of it are told, and the line of `memory.stat` of what would be given up.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def available_bytes() -> int | None:
    """Memory that programs can still get without others being pushed out; `None` where the system does not say.

    In a container it is at most what its limit leaves.
    """
    known = [size for size in (_available_to_all(), _left_to_container()) if size is not None]
    return min(known, default=None)


def _left_to_container() -> int | None:
    for limit, used, reclaimable in _LIMITS:
        try:
            with open(limit) as file:
                most = int(file.read())
            with open(used) as file:
                taken = int(file.read())
            with open(os.path.join(os.path.dirname(limit), "memory.stat")) as file:
                given_up = dict(line.split() for line in file).get(reclaimable, "0")
        except (OSError, ValueError):
            # No such file, or no limit, which is written as a word.
            continue
        return max(0, most - taken + int(given_up))
    return None


def _available_to_all() -> int | None:
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
