"""One contender doing one kind of work in a process of its own; prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_keras.memory import available_bytes
from tools.bench.shapes import CALLS, RAGGED, SHAPES, prompts

_WARM_TOKENS = 48
_WARM_SECONDS = 12.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender")
    parser.add_argument("work", choices=("decode", "ragged", "calls", "load", "train"))
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--size", default="mini")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    os.environ |= {"KERAS_BACKEND": options.backend, "TF_CPP_MIN_LOG_LEVEL": "3"}

    from tools.bench.contenders import CONTENDERS

    shape = SHAPES[options.size]
    if options.work == "train":
        # Whoever needs more memory than there is fails, and leaves the machine to others.
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (available_bytes() or most, most))
        _print(_trained(options, shape))
        return
    if options.work == "load":
        _print(_loaded(options, shape))
        return
    run = CONTENDERS[options.contender](shape, options.dtype)

    def seconds(rows: list[list[int]], new: int) -> float:
        began = time.perf_counter()
        run(rows, new)
        return time.perf_counter() - began

    found: dict[str, float | int | None] = {}
    if options.work == "decode":
        rows = prompts((options.prompt,), shape["vocabulary_size"])
        found["first_call_s"] = seconds(rows, options.new)
        seconds(rows, 1)
        # Long enough that what a program does once, when it is used for longer, is done.
        began, made = time.perf_counter(), 0
        while made < _WARM_TOKENS or time.perf_counter() - began < _WARM_SECONDS:
            seconds(rows, options.new)
            made += options.new
        # Others use this machine, too: each run is compared with its neighbour, and the middle one counts.
        turns = [(seconds(rows, 1), seconds(rows, options.new)) for _ in range(5)]
        decode = statistics.median(whole - prefill for prefill, whole in turns)
        found |= {"prefill_s": min(prefill for prefill, _ in turns), "tokens_per_s": (options.new - 1) / decode}
    elif options.work == "ragged":
        rows = prompts(RAGGED, shape["vocabulary_size"])
        seconds(rows, options.new)
        whole = min(seconds(rows, options.new) for _ in range(3))
        found |= {"total_s": whole, "tokens_per_s": len(rows) * options.new / whole}
    else:
        began = time.perf_counter()
        for length, new in CALLS:
            compilations = run(prompts((length,), shape["vocabulary_size"]), new)
        found |= {"total_s": time.perf_counter() - began, "compilations": compilations}
    _print(found)


def _loaded(options: argparse.Namespace, shape: dict[str, Any]) -> dict[str, Any]:
    from gemma2_keras.memory import peak_bytes
    from tools.bench.loaders import LOADERS, checkpoint, file, imports

    folder = checkpoint(shape, options.dtype)
    # All find the file in memory.
    file(folder)
    imports(options.contender)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes() or 0
    began = time.perf_counter()
    logits = LOADERS[options.contender](folder)
    loaded, above = time.perf_counter() - began, (peak_bytes() or 0) - before
    logits()
    return {"total_s": loaded, "first_call_s": time.perf_counter() - began, "above_bytes": above}


def _trained(options: argparse.Namespace, shape: dict[str, Any]) -> dict[str, Any]:
    from gemma2_keras.memory import peak_bytes
    from tools.bench.trainers import TRAINERS

    prepare = TRAINERS[options.contender](shape, options.dtype)
    built = peak_bytes() or 0
    # What building the model took in passing, and gave back, is not the training's.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes() or 0
    step = prepare()
    rows = prompts((options.length + 1,) * options.batch, shape["vocabulary_size"])
    tokens = np.asarray(rows, "int32")

    def seconds() -> float:
        began = time.perf_counter()
        step(tokens)
        return time.perf_counter() - began

    first = seconds()
    usual = statistics.median(seconds() for _ in range(options.steps))
    return {
        "first_call_s": first,
        "tokens_per_s": options.batch * options.length / usual,
        "above_bytes": (peak_bytes() or 0) - before,
        "peak_bytes": max(peak_bytes() or 0, built),
    }


def _print(found: dict[str, Any]) -> None:
    from gemma2_keras.memory import peak_bytes

    print(json.dumps({"peak_bytes": peak_bytes(), "mapped_bytes": _mapped_bytes(), **found}))
    sys.stdout.flush()


def _mapped_bytes() -> int:
    """Memory of this process that holds files as they are on the disk, such as libraries; it is given up first."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile:"))


if __name__ == "__main__":
    main()
