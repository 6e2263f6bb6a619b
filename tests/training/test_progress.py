"""What is shown while a run is trained."""

from __future__ import annotations

import io
import itertools
import os
import re

import pytest

from gemma2_keras.training import progress
from gemma2_keras.training.progress import TrainingProgress
from tests.training import small

pytestmark = pytest.mark.once
LOGS = {"loss": 2.5, "sparse_categorical_accuracy": 0.25, "perplexity": 12.1825}
RESULTS = {**LOGS, "val_loss": 2.75, "val_sparse_categorical_accuracy": 0.2}


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch, stream, verbose=1, first=0, seconds=2.0):
    """Two epochs of five steps, each of so many seconds, the first one taken up at some step."""
    monkeypatch.setattr("sys.stdout", stream)
    clock = itertools.count(0.0, seconds)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    data = small.data()
    bar = TrainingProgress(data, epochs=2)
    bar.set_params({"verbose": verbose, "epochs": 1, "steps": 5 - first})
    bar.on_train_begin()
    for epoch in range(2):
        data.start_at(epoch, first if epoch == 0 else 0)
        bar.on_epoch_begin(epoch)
        for batch in range(data.num_batches):
            bar.on_train_batch_begin(batch)
            bar.on_train_batch_end(batch, LOGS)
        data.on_epoch_end()
        bar.on_epoch_end(epoch, RESULTS)
    return stream.getvalue()


def test_log_file_gets_plain_lines(monkeypatch):
    text = shown(monkeypatch, io.StringIO(), seconds=20.0)
    assert not re.search(r"[\r\b\x1b]", text)
    lines = text.splitlines()
    # One in half a minute, and the ends of the epochs.
    assert [line.split()[2] for line in lines] == ["1/5", "3/5", "5/5", "5/5", "1/5", "3/5", "5/5", "5/5"]
    data = small.data()
    tokens = sum(data.num_tokens(i) for i in (1, 2))
    # Two steps in 40 seconds; seven are left.
    assert lines[1] == (
        f"Epoch 1/2  3/5  {tokens / 40:,.0f} tokens/s  2:20 left  loss 2.5  accuracy 0.25  perplexity 12.18"
    )
    # The time of a validation counts for the epoch that follows, too.
    assert "2:00 left" in lines[3]
    assert lines[3].endswith("val_loss 2.75  val_accuracy 0.2")
    assert "took" in lines[-1]


def test_screen_is_written_over(monkeypatch):
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda: os.terminal_size((60, 20)))
    text = shown(monkeypatch, Screen())
    assert text.count("\n") == 2
    unfinished = [line for line in re.split(r"[\r\n]", text) if line and "val_loss" not in line]
    assert all(len(line) < 60 for line in unfinished)
    assert "━━━━────────────────" in text
    # Nothing of a longer line is left behind a shorter one.
    for line in text.split("\n"):
        parts = line.split("\r")[1:]
        assert all(len(later) >= len(earlier.rstrip()) for earlier, later in itertools.pairwise(parts))


def test_notebook_is_known_by_its_output(monkeypatch):
    pytest.importorskip("ipykernel")
    from ipykernel.iostream import OutStream

    # With the kernel's package imported, a log file is still one.
    assert not re.search(r"[\r\b\x1b]", shown(monkeypatch, io.StringIO()))
    cell = OutStream.__new__(OutStream)
    cell._isatty = False
    pieces = []
    monkeypatch.setattr(cell, "write", lambda text: pieces.append(text) or len(text), raising=False)
    monkeypatch.setattr(cell, "flush", lambda: None)
    monkeypatch.setattr(cell, "getvalue", lambda: "".join(pieces), raising=False)
    text = shown(monkeypatch, cell)
    assert text.count("\n") == 2
    assert "━━━━────────────────" in text


def test_epoch_that_was_broken_off_is_counted_whole(monkeypatch):
    text = shown(monkeypatch, io.StringIO(), first=3, seconds=40.0)
    assert [line.split()[2] for line in text.splitlines()][:3] == ["4/5", "5/5", "5/5"]


def test_verbosity(monkeypatch):
    assert shown(monkeypatch, io.StringIO(), verbose=0) == ""
    assert len(shown(monkeypatch, io.StringIO(), verbose=2).splitlines()) == 2


def test_fit_shows_it_in_place_of_its_own(adapters, capsys):
    data = small.data()
    adapters.fresh().fit(data, validation_data=small.data(4), callbacks=[TrainingProgress(data)], shuffle=False)
    out = capsys.readouterr().out
    assert "step" not in out
    assert re.search(r"Epoch 1/1  5/5  [\d,]+ tokens/s  took 0:0\d  loss \d", out)
    assert "val_perplexity" in out
