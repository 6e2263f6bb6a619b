"""How a run is getting on, for a terminal, a notebook or a log file."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from typing import Any

import keras

from gemma2_keras.training.token_dataset import TokenDataset

_WIDTH = 20
_STEPS_OF_SPEED = 50
# Seconds between two lines: one that is written over, or one of a log.
_SECONDS_ON_SCREEN = 0.1
_SECONDS_IN_LOG = 30.0
_SHORT = {"sparse_categorical_accuracy": "accuracy"}


class TrainingProgress(keras.callbacks.ProgbarLogger):
    """In place of Keras' progress bar: real tokens per second and the time that the whole run still takes.

    On a terminal and in a notebook a line is written over as training goes on, and stays at the end of each epoch; a
    file gets a line every half minute. `verbose=0` of `fit` shows nothing, `verbose=2` the ends of epochs alone.

    Args:
        data: the `TokenDataset` that is trained on; padding is not counted.
        epochs: of the whole run; `None` is what `fit` is given.

    Example:

    >>> import numpy as np
    >>> from gemma2_keras import Gemma2CausalLM
    >>> model = Gemma2CausalLM.from_preset("gemma2_tiny_en")
    >>> model.compile("sgd")
    >>> x = {"token_ids": np.ones((4, 8), "int32"), "padding_mask": np.ones((4, 8), "int32")}
    >>> data = TokenDataset(x, x["token_ids"], np.ones((4, 8), "float32"), batch_size=2)
    >>> _ = model.fit(data, callbacks=[TrainingProgress(data)], shuffle=False)  # doctest: +ELLIPSIS
    Epoch 1/1...
    """

    def __init__(self, data: TokenDataset, epochs: int | None = None) -> None:
        super().__init__()
        self._data = data
        self._epochs_of_run = epochs
        self._begun_at = -1.0
        self._shown_at = float("-inf")
        # How long a validation takes.
        self._validating = 0.0

    def set_params(self, params) -> None:
        """Take what `fit` was given."""
        super().set_params(params)
        self._total = params["epochs"] if self._epochs_of_run is None else self._epochs_of_run

    def on_train_begin(self, logs=None) -> None:
        """Note when the run began; `fit` may be called more than once for it."""
        super().on_train_begin(logs)
        if self._begun_at < 0:
            self._begun_at = time.monotonic()

    def on_epoch_begin(self, epoch, logs=None) -> None:
        """Begin to measure anew: compiling or validating is no speed of training."""
        self._epoch = epoch
        self._columns = 0
        # Times, tokens since the epoch was taken up, and Keras' numbers of the last steps.
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=_STEPS_OF_SPEED)
        self._tokens = 0
        self._made = 0

    def on_train_batch_end(self, batch, logs=None) -> None:
        """Count the tokens of the step, and show the line if it is time."""
        now = time.monotonic()
        seen = self._marks[-1][2] if self._marks else -1
        self._tokens += sum(self._data.num_tokens(i) for i in range(seen + 1, batch + 1))
        self._marks.append((now, self._tokens, batch))
        self._trained_at = now
        pause = _SECONDS_ON_SCREEN if _is_rewritable() else _SECONDS_IN_LOG
        if self.verbose == 1 and now - self._shown_at >= pause:
            self._shown_at = now
            self._show(self._line(self._data.first_step + batch + 1, logs or {}), final=False)

    def on_epoch_end(self, epoch, logs=None) -> None:
        """Show the line of the whole epoch, with the results of validation."""
        if not self._marks:
            return
        # The data are at the next epoch by now, and Keras counted from where this one was taken up.
        made = self._made + self._marks[-1][2] + 1
        self._validating = time.monotonic() - self._trained_at
        if self.verbose:
            self._show(self._line(made, logs or {}), final=True)

    def on_train_batch_begin(self, batch, logs=None) -> None:
        """Note where the epoch was taken up."""
        if not self._marks:
            self._made = self._data.first_step

    def _line(self, made: int, logs: dict[str, Any]) -> str:
        steps = self._data.batches_per_epoch
        filled = _WIDTH * made // steps
        parts = [f"Epoch {self._epoch + 1}/{self._total}", f"{made:>{len(str(steps))}}/{steps}"]
        if _is_rewritable():
            parts.append("━" * filled + "─" * (_WIDTH - filled))
        (start, tokens, first), (end, all_tokens, last) = self._marks[0], self._marks[-1]
        if last > first and end > start:
            parts.append(f"{(all_tokens - tokens) / (end - start):,.0f} tokens/s")
            epochs = self._total - self._epoch - 1
            seconds = (end - start) / (last - first) * (epochs * steps + steps - made) + epochs * self._validating
            parts.append(f"{_duration(seconds)} left" if seconds else f"took {_duration(end - self._begun_at)}")
        results = [f"{_short(name)} {float(value):.4g}" for name, value in logs.items()]
        return "  ".join(parts + results)

    def _show(self, line: str, final: bool) -> None:
        if not _is_rewritable():
            print(line, flush=True)
            return
        # A line that wraps cannot be written over.
        if not final and sys.stdout.isatty():
            line = line[: shutil.get_terminal_size().columns - 1]
        print("\r" + line.ljust(self._columns), end="\n" if final else "", flush=True)
        self._columns = 0 if final else len(line)


def _is_rewritable() -> bool:
    # Another package may have imported ipykernel anywhere; only in a notebook's cell does it take what is printed.
    return sys.stdout.isatty() or type(sys.stdout).__module__ == "ipykernel.iostream"


def _short(name: str) -> str:
    start = "val_" if name.startswith("val_") else ""
    bare = name.removeprefix("val_")
    return start + _SHORT.get(bare, bare)


def _duration(seconds: float) -> str:
    """A duration as hours, minutes and seconds.

    >>> _duration(59.7), _duration(3725)
    ('1:00', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
