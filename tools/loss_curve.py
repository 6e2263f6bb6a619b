"""The loss of each training step, noted while `fit` runs and drawn as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np


class StepLosses(keras.callbacks.Callback):
    """Notes the loss of each step in `losses`; Keras itself reports the mean since the epoch began."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self._sum = 0.0

    def on_epoch_begin(self, epoch, logs=None) -> None:
        """Begin the mean anew, as Keras does."""
        self._sum = 0.0

    def on_train_batch_end(self, batch, logs=None) -> None:
        """Take the new sum less the old one."""
        total = float((logs or {})["loss"]) * (batch + 1)
        self.losses.append(total - self._sum)
        self._sum = total


def plot_losses(losses: Sequence[float], path: Path, title: str, held_out: float | None = None) -> None:
    """Draw each step's loss, its running mean, and the loss on held-out text if there is one, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    window = max(1, len(losses) // 30)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(np.arange(1, len(losses) + 1), losses, linewidth=0.6, alpha=0.4, label="each step")
    axes.plot(np.arange(window, len(losses) + 1), smooth, label=f"mean of {window} steps")
    if held_out is not None:
        axes.axhline(held_out, linestyle="--", color="black", linewidth=1, label=f"held-out text: {held_out:.2f}")
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)", title=title)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
