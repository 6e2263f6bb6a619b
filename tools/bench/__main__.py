"""Run the benchmark: `python -m tools.bench`, or some rows of it: `python -m tools.bench --only D3,C1`.

Needs the extra `bench` beside the three backends. Contenders of a row take turns, each in a process of its own, so that
ratios are of one machine at one time. Writes `tools/bench/results/results.json` and `ratios.png`, and `BENCHMARKS.md`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.bench.limits import limits, machine
from tools.bench.report import RESULTS, write
from tools.bench.table import ROWS, Contender, Row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help=f"comma-separated rows of {', '.join(row.name for row in ROWS)}")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each contender; the best counts (default: 1)")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one turn (default: 900)")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [row.name for row in ROWS]
    unknown = [name for name in wanted if not any(row.name.startswith(name) for row in ROWS)]
    if unknown:
        parser.error(f"--only: no row {', '.join(unknown)}; there are {', '.join(row.name for row in ROWS)}")
    # Rows that are not measured now keep their earlier figures, with their own date and limits.
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    stored["machine"] = machine()
    asked = {row.source for row in ROWS if any(row.name.startswith(name) for name in wanted)}
    for row in ROWS:
        if row.name not in asked:
            continue
        print(f"{row.name}: {row.work}", flush=True)
        found: dict[str, Any] = {}
        stored["rows"][row.name] = {
            "date": datetime.date.today().isoformat(),
            "limits": limits(),
            "contenders": found,
        }
        # Written after each turn: a run that is cut off keeps what it has.
        for _ in _turns(row, found, options.rounds, options.timeout):
            write(stored)


def _turns(row: Row, found: dict[str, Any], rounds: int, timeout: int) -> Iterator[None]:
    for _ in range(rounds):
        for contender in row.contenders:
            result = _turn(row, contender, timeout)
            print(f"  {contender.label:<28}{json.dumps(result)}", flush=True)
            best = found.get(contender.label)
            if best is None or "error" in best or row.better(result, best):
                found[contender.label] = result
            yield


def _turn(row: Row, contender: Contender, timeout: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.bench.worker", contender.name, *row.arguments]
    if contender.backend:
        command += ["--backend", contender.backend]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=Path(__file__).parents[2])
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["failed"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
