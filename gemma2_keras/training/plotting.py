"""The curve of a run as a picture."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np

from gemma2_keras.errors import InputError
from gemma2_keras.training.history import TrainingHistory
from gemma2_keras.training.run_folder import HISTORY_FILE


def plot_history(history: Any, path: str | os.PathLike | None = None, title: str | None = None) -> Any:
    """Draw the loss of each step and each epoch, in training and validation, and the perplexity of each epoch.

    Args:
        history: what `fine_tune` returned, a `keras.callbacks.History`, or the folder of a run, which may be under way.
        path: of a picture to write, such as `"loss.png"`; `None` writes none.
        title: above the picture.

    Returns:
        A matplotlib figure, which a notebook shows.

    Raises:
        ImportError: if matplotlib is not installed.
        InputError: if there is nothing to draw.
        CheckpointError: if the folder holds no run.

    Example:

    >>> epochs = [{"epoch": 0, "loss": 2.5, "val_loss": 2.7}, {"epoch": 1, "loss": 2.1, "val_loss": 2.4}]
    >>> [axes.get_xlabel() for axes in plot_history(TrainingHistory(epochs=epochs)).axes]
    ['epoch']
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter
    except ImportError as error:
        raise ImportError(
            'Pictures need matplotlib: pip install "gemma2-keras[plot]", or pip install matplotlib.'
        ) from error

    class Picture(Figure):
        """A figure that a notebook shows without pyplot, and so once."""

        def _repr_png_(self) -> bytes:
            content = io.BytesIO()
            self.savefig(content, format="png")
            return content.getvalue()

    noted = _noted(history)
    if not noted.steps and not noted.epochs:
        raise InputError("`history` has no step yet: there is nothing to draw.")
    by_epoch = noted.history
    measured = [name for name in ("perplexity", "val_perplexity") if len(by_epoch.get(name, ())) > 1]
    figure = Picture(figsize=(11 if measured else 7, 4), dpi=110, layout="constrained")
    all_axes: Any = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    axes = all_axes[0]
    # Where each epoch ends, on the axis of steps if there is one.
    ends = {epoch["epoch"]: epoch["epoch"] + 1 for epoch in noted.epochs}
    if noted.steps:
        steps, losses = [step["step"] for step in noted.steps], noted.losses
        for step in noted.steps:
            ends[step["epoch"]] = step["step"]
        window = max(1, len(losses) // 30)
        axes.plot(steps, losses, linewidth=0.6, alpha=0.4, label="each step")
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], smooth, label=f"mean of {window} steps")
    _plot_epochs(axes, noted, "loss", ends, None if noted.steps else "training")
    _plot_epochs(axes, noted, "val_loss", ends, "validation")
    axes.set(xlabel="step" if noted.steps else "epoch", ylabel="loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    if measured:
        for name in measured:
            label = "validation" if name.startswith("val_") else "training"
            _plot_epochs(all_axes[1], noted, name, {epoch: epoch + 1 for epoch in ends}, label)
        all_axes[1].set(xlabel="epoch", ylabel="perplexity", yscale="log")
        all_axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        # Plain numbers, where matplotlib would write powers of ten.
        all_axes[1].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        all_axes[1].yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        all_axes[1].legend()
    if title is not None:
        figure.suptitle(title)
    if path is not None:
        figure.savefig(path)
    return figure


def _noted(history: Any) -> TrainingHistory:
    if isinstance(history, TrainingHistory):
        return history
    if isinstance(history, keras.callbacks.History):
        # Validation that is left out in some epochs cannot be told to belong to the others.
        whole = {name: values for name, values in history.history.items() if len(values) == len(history.epoch)}
        epochs = [
            {"epoch": epoch, **{name: values[i] for name, values in whole.items()}}
            for i, epoch in enumerate(history.epoch)
        ]
        return TrainingHistory(epochs=epochs)
    if isinstance(history, str | os.PathLike):
        return TrainingHistory.read(Path(history) / HISTORY_FILE)
    raise InputError(
        f"`history` must be what `fine_tune` or `fit` returned, or a folder; given {type(history).__name__}."
    )


def _plot_epochs(axes: Any, noted: TrainingHistory, name: str, ends: dict[int, int], label: str | None) -> None:
    points = [(ends[epoch["epoch"]], epoch[name]) for epoch in noted.epochs if name in epoch]
    if points and label is not None:
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
