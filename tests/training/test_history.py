"""The curve of a run: noted, kept, drawn."""

from __future__ import annotations

import builtins
import errno
import sys

import numpy as np
import pytest

from gemma2_keras import RunHistory, TrainingHistory, fine_tune, plot_history
from gemma2_keras.errors import CheckpointError, InputError
from tests.training import small

LOGS = [2.0, 2.5, 2.25]


def noted(path, steps=LOGS, epoch=0):
    history = RunHistory(path)
    history.on_epoch_begin(epoch)
    for batch, mean in enumerate(steps):
        history.on_train_batch_end(batch, {"loss": mean})
    history.on_epoch_end(epoch, {"loss": steps[-1], "val_loss": 3.0})
    return history.noted


@pytest.mark.once
def test_loss_of_a_step_is_the_difference_of_sums(tmp_path):
    history = noted(tmp_path / "history.jsonl")
    assert history.losses == [2.0, 3.0, 1.75]
    assert history.history == {"loss": [2.25], "val_loss": [3.0]}
    assert TrainingHistory.read(tmp_path / "history.jsonl") == history


@pytest.mark.once
def test_existing_file_is_continued(tmp_path):
    path = tmp_path / "history.jsonl"
    noted(path)
    # As a process leaves it that is killed while it writes.
    with open(path, "a") as file:
        file.write('{"step": 4, "epo')
    assert len(TrainingHistory.read(path).steps) == 3
    history = noted(path, epoch=1)
    assert [step["step"] for step in history.steps] == [1, 2, 3, 4, 5, 6]
    assert TrainingHistory.read(path) == history


@pytest.mark.once
def test_what_came_after_a_checkpoint_is_forgotten(tmp_path):
    path = tmp_path / "history.jsonl"
    noted(path)
    noted(path, epoch=1)
    history = RunHistory(path)
    history.go_back_to(epoch=1, step=4)
    assert [step["step"] for step in history.noted.steps] == [1, 2, 3, 4]
    assert [epoch["epoch"] for epoch in history.noted.epochs] == [0]
    assert TrainingHistory.read(path) == history.noted


@pytest.mark.once
def test_full_disk_delays_lines(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    history = RunHistory(path)
    history.on_epoch_begin(0)
    history.on_train_batch_end(0, {"loss": 2.0})

    def full(file, mode="r", **options):
        with original(file, mode, **options) as opened:
            opened.write(b'{"half')
        raise OSError(errno.ENOSPC, "No space left on device")

    original = builtins.open
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", full)
        with pytest.warns(UserWarning, match="cannot be written for now"):
            history.on_train_batch_end(1, {"loss": 2.5})
        # Said once, until it is written.
        history.on_train_batch_end(2, {"loss": 2.5})
    history.on_epoch_end(0, {"loss": 2.5})
    assert TrainingHistory.read(path) == history.noted
    assert len(history.noted.steps) == 3


@pytest.mark.once
def test_loss_that_is_no_number_is_kept(tmp_path):
    noted(tmp_path / "history.jsonl", [2.0, float("nan")])
    assert np.isnan(TrainingHistory.read(tmp_path / "history.jsonl").losses[1])


@pytest.mark.once
@pytest.mark.parametrize("line", ["no JSON", "[1]", '{"step": 1}', "1", '{"epoch": []}'])
def test_other_files_are_refused(tmp_path, line):
    path = tmp_path / "history.jsonl"
    path.write_text(f'{{"epoch": 0, "loss": 1.0}}\n{line}\n')
    with pytest.raises(CheckpointError, match=r"history.jsonl, line 2, is no line of a run's history"):
        TrainingHistory.read(path)


@pytest.mark.once
def test_missing_run_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"history.jsonl cannot be read as the history of a run"):
        plot_history(tmp_path)


def test_picture_of_a_run(adapters, tmp_path):
    data = small.data()
    history = fine_tune(adapters.fresh(), data, epochs=2, validation_data=small.data(4), folder=tmp_path, verbose=0)
    figure = plot_history(tmp_path, tmp_path / "loss.png", title="A run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert figure._repr_png_().startswith(b"\x89PNG")
    losses, perplexities = figure.axes
    lines = {line.get_label(): line for line in losses.get_lines()}
    assert lines["each step"].get_ydata().tolist() == history.losses
    assert lines["validation"].get_xdata().tolist() == [5, 10]
    assert lines["validation"].get_ydata().tolist() == history.history["val_loss"]
    lines = {line.get_label(): line for line in perplexities.get_lines()}
    assert lines["training"].get_ydata().tolist() == history.history["perplexity"]
    assert lines["validation"].get_ydata().tolist() == history.history["val_perplexity"]


def test_picture_of_keras_history(adapters):
    data = small.data()
    history = adapters.fresh().fit(data, epochs=2, validation_data=small.data(4), shuffle=False, verbose=0)
    losses, _ = plot_history(history).axes
    assert {line.get_label() for line in losses.get_lines()} == {"training", "validation"}


@pytest.mark.once
def test_nothing_to_draw_is_said():
    with pytest.raises(InputError, match="nothing to draw"):
        plot_history(TrainingHistory())
    with pytest.raises(InputError, match="what `fine_tune` or `fit` returned, or a folder; given dict"):
        plot_history({})


@pytest.mark.once
def test_missing_matplotlib_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "gemma2-keras\[plot\]"'):
        plot_history(TrainingHistory(epochs=[{"epoch": 0, "loss": 1.0}]))
