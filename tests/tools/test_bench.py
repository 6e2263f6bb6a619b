"""The benchmark's table, its worker on a very small shape, and its page."""

from __future__ import annotations

import json
import resource
import sys
import tempfile

import pytest

from tools.bench import report, worker
from tools.bench.contenders import CONTENDERS
from tools.bench.loaders import LOADERS
from tools.bench.shapes import CALLS, RAGGED, SHAPES, prompts
from tools.bench.table import ROWS
from tools.bench.trainers import TRAINERS

SMALL = {**SHAPES["mini"], "vocabulary_size": 640, "num_layers": 1, "hidden_dim": 24, "intermediate_dim": 32}
LIMITS = {"read_gb_s": 40.0, "matmul_float32_gf_s": 100.0, "matmul_bfloat16_gf_s": 400.0}


@pytest.mark.once
def test_goals_are_about_contenders_of_their_row():
    for row in ROWS:
        labels = [contender.label for contender in row.contenders]
        assert len(labels) == len(set(labels))
        known = {"train": TRAINERS, "load": LOADERS}.get(row.arguments[0], CONTENDERS)
        assert all(contender.name in known for contender in row.contenders)
        source = next(other for other in ROWS if other.name == row.source)
        assert (source.arguments, source.contenders) == (row.arguments, row.contenders)
        assert all(mine.startswith("gemma2_keras") and {mine, other} <= set(labels) for mine, other, _ in row.goals)


@pytest.mark.once
def test_prompts_have_their_lengths_and_are_the_same_each_time():
    rows = prompts(RAGGED, 640)
    assert [len(row) for row in rows] == list(RAGGED)
    assert rows == prompts(RAGGED, 640)
    assert all(0 <= token < 640 for row in rows for token in row)
    assert len({length for length, _ in CALLS}) == len(CALLS)


@pytest.fixture
def limits_of_memory():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.usefixtures("limits_of_memory")
@pytest.mark.parametrize("work", ["decode", "ragged", "calls", "load", "train"])
def test_a_worker_prints_what_its_contender_took(monkeypatch, capsys, tmp_path, work):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(SHAPES, "small", SMALL)
    monkeypatch.setattr(sys, "argv", ["worker", "gemma2_keras", work, "--size", "small", "--prompt", "9", "--new", "3"])
    monkeypatch.setattr(worker, "_WARM_SECONDS", 0.0)
    monkeypatch.setattr(worker, "RAGGED", (3, 9))
    monkeypatch.setattr(worker, "CALLS", ((3, 2), (9, 4)))
    worker.main()
    found = json.loads(capsys.readouterr().out)
    assert found["peak_bytes"] > found["mapped_bytes"] > 0
    expected = {
        "decode": {"first_call_s", "prefill_s", "tokens_per_s"},
        "ragged": {"total_s", "tokens_per_s"},
        "calls": {"total_s", "compilations"},
        "load": {"total_s", "first_call_s", "above_bytes"},
        "train": {"first_call_s", "tokens_per_s", "above_bytes"},
    }
    assert expected[work] <= set(found)


def stored(**figures):
    """Results in which every contender has the same figures, but for what is named."""
    usual = {
        "tokens_per_s": 10.0,
        "prefill_s": 1.0,
        "total_s": 2.0,
        "first_call_s": 3.0,
        "peak_bytes": 10**9,
        "mapped_bytes": 10**8,
        "above_bytes": 10**9,
    }
    rows = {}
    for row in ROWS:
        if row.measured_with:
            continue
        contenders = {contender.label: {**usual, **figures.get(contender.name, {})} for contender in row.contenders}
        rows[row.name] = {"date": "2026-01-01", "limits": LIMITS, "contenders": contenders}
    return {"machine": {"processor": "a processor", "cores": 2, "memory_gb": 24}, "rows": rows}


@pytest.mark.once
def test_ratios_say_how_many_times_better_we_are(tmp_path, monkeypatch):
    for name, file in (("RESULTS", "results.json"), ("PLOT", "ratios.png"), ("PAGE", "page.md")):
        monkeypatch.setattr(report, name, tmp_path / "results" / file)
    quick = {"tokens_per_s": 40.0, "prefill_s": 0.5, "total_s": 0.2}
    report.write(stored(gemma2_keras=quick))
    page = report.PAGE.read_text()
    found = {row.name: [ratio for *_, ratio in report._ratios(row, stored(gemma2_keras=quick))] for row in ROWS}
    assert set(found["D1"]) == {4.0}
    assert set(found["P1-2000"]) == {2.0}
    assert set(found["C1"]) == {10.0}
    assert "one prompt of 128 tokens | gemma2_keras torch | llama.cpp | **4.00** | 1.1 |" in page
    assert json.loads(report.RESULTS.read_text())["rows"].keys() == {row.source for row in ROWS}
    assert report.PLOT.stat().st_size > 1000
    assert page.rstrip().endswith(report.NOTES.read_text().rstrip().splitlines()[-1])


@pytest.mark.once
def test_a_contender_that_failed_has_no_ratio(tmp_path, monkeypatch):
    for name, file in (("RESULTS", "results.json"), ("PLOT", "ratios.png"), ("PAGE", "page.md")):
        monkeypatch.setattr(report, name, tmp_path / "results" / file)
    results = stored()
    results["rows"]["D1"]["contenders"]["llama.cpp"] = {"error": "no such library"}
    report.write(results)
    page = report.PAGE.read_text()
    assert "| llama.cpp | failed: no such library |" in page
    assert "| gemma2_keras torch | llama.cpp | - | 1.1 |" in page
