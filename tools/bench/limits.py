"""What this machine can do at most, measured in the same run as the contenders."""

from __future__ import annotations

import os
import platform
import time


def machine() -> dict[str, str | int]:
    """What it is."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": name, "cores": len(os.sched_getaffinity(0)), "memory_gb": round(memory / 1e9)}


def limits() -> dict[str, float]:
    """Read bandwidth in GB/s, and matrix products in GF/s, of PyTorch; the quickest of some tries."""
    import torch

    numbers = torch.ones(2**28)

    def best(work, times: int = 8) -> float:
        work()
        found = []
        for _ in range(times):
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
        return min(found)

    rates = {"read_gb_s": numbers.nbytes / best(numbers.sum) / 1e9}
    del numbers
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones((2048, 2048), dtype=dtype)
        rates[f"matmul_{str(dtype).split('.')[1]}_gf_s"] = 2 * 2048**3 / best(lambda a=a: a @ a, 4) / 1e9
    return rates
