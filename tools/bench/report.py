"""Figures to JSON, a page of Markdown and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.bench.shapes import SHAPES
from tools.bench.table import ROWS, Row

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "results.json"
PLOT = FOLDER / "results" / "ratios.png"
PAGE = FOLDER.parents[1] / "BENCHMARKS.md"
# What was tried and did not pay, written by hand.
NOTES = FOLDER / "notes.md"


def write(stored: dict[str, Any]) -> None:
    """Write all three."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
    rows = [row for row in ROWS if row.source in stored["rows"]]
    _plot(rows, stored)
    PAGE.write_text(_page(rows, stored))


def _page(rows: list[Row], stored: dict[str, Any]) -> str:
    machine = stored["machine"]
    lines = [
        "# Benchmarks",
        "",
        "Made by `python -m tools.bench`; not edited by hand. Every contender has random weights and a process of its",
        "own, and those of a row take turns within one run: ratios count, single figures change with the machine.",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, no accelerator.",
        "",
        "![ratios](tools/bench/results/ratios.png)",
        "",
        "## How many times better",
        "",
        "| row | work | of | against | ratio | goal |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for mine, other, goal, ratio in _ratios(row, stored):
            shown = "-" if ratio is None else f"**{ratio:.2f}**" if ratio >= goal else f"{ratio:.2f}"
            lines.append(f"| {row.name} | {row.work} | {mine} | {other} | {shown} | {goal} |")
    lines += ["", "Bold where the goal is reached.", "", "## Figures", ""]
    for row in rows:
        if row.measured_with:
            continue
        part = stored["rows"][row.name]
        rates = part["limits"]
        lines += [
            f"### {row.name}: {row.work}",
            "",
            f"{part['date']}; read {rates['read_gb_s']:.1f} GB/s, matrix products "
            f"{rates['matmul_float32_gf_s']:.0f} GF/s in float32, {rates['matmul_bfloat16_gf_s']:.0f} in bfloat16.",
            "",
            "| contender | tokens/s | GB/s of weights | prefill, s | total, s | first call, s | programs "
            "| above the model, GB | peak, GB |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, found in part["contenders"].items():
            lines.append(_figures(row, name, found))
        lines.append("")
    lines += [*_memory(stored), NOTES.read_text().rstrip(), ""]
    return "\n".join(lines)


def _figures(row: Row, name: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"| {name} | failed: {found['error']} | | | | | | | |"

    def shown(key: str, digits: int) -> str:
        value = found.get(key)
        return "" if value is None else f"{value:.{digits}f}"

    read = ""
    if row.arguments[0] == "decode":
        read = f"{found['tokens_per_s'] * _weight_bytes(row) / 1e9:.1f}"
    peak = f"{found['peak_bytes'] / 1e9:.2f}"
    cells = [shown("tokens_per_s", 1), read, shown("prefill_s", 3), shown("total_s", 2), shown("first_call_s", 1)]
    above = f"{found['above_bytes'] / 1e9:.2f}" if "above_bytes" in found else ""
    return f"| {name} | {' | '.join(cells)} | {shown('compilations', 0)} | {above} | {peak} |"


def _memory(stored: dict[str, Any]) -> list[str]:
    """Peak memory of building and generating, from the row of the largest model."""
    row = next(row for row in ROWS if row.name == "D1")
    if row.name not in stored["rows"]:
        return []
    found = stored["rows"][row.name]["contenders"]
    weights = _weight_bytes(row)
    lines = [
        "### M1: peak memory of D1, from building the model to the last token",
        "",
        f"The weights have {weights / 1e9:.2f} GB. Mapped are files as they are on the disk: code of libraries, and",
        "with llama.cpp the weights.",
        "",
        "| contender | peak, GB | of the weights | mapped, GB |",
        "|---|---|---|---|",
    ]
    for name, result in found.items():
        if "error" not in result:
            peak, mapped = result["peak_bytes"], result["mapped_bytes"]
            lines.append(f"| {name} | {peak / 1e9:.2f} | {peak / weights:.2f} | {mapped / 1e9:.2f} |")
    return [*lines, ""]


def _weight_bytes(row: Row) -> int:
    from gemma2_keras import Gemma2Config

    options = dict(zip(row.arguments[1::2], row.arguments[2::2], strict=True))
    config = Gemma2Config(**SHAPES[options.get("--size", "mini")])
    return config.parameter_count * (2 if options.get("--dtype") == "bfloat16" else 4)


def _ratios(row: Row, stored: dict[str, Any]) -> list[tuple[str, str, float, float | None]]:
    found = stored["rows"][row.source]["contenders"]
    ratios = []
    for mine, other, goal in row.goals:
        a, b = found.get(mine, {"error": ""}), found.get(other, {"error": ""})
        ratios.append((mine, other, goal, None if "error" in a or "error" in b else row.ratio(a, b)))
    return ratios


def _plot(rows: list[Row], stored: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{row.name}  {mine.removeprefix('gemma2_keras ')} / {other}", ratio, goal)
        for row in rows
        for mine, other, goal, ratio in _ratios(row, stored)
        if ratio is not None
    ]
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.26 * len(bars)))
    places = range(len(bars))
    axes.barh(places, [ratio for _, ratio, _ in bars], color="#4878a8")
    axes.scatter([goal for _, _, goal in bars], places, marker="|", s=90, color="black", label="goal", zorder=3)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(places, [label for label, _, _ in bars], fontsize=7)
    axes.set_xscale("log")
    axes.set_xlabel("times better than the other")
    axes.invert_yaxis()
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)
    pyplot.close(figure)
