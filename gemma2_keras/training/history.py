"""The curve of a training run: noted step by step while `fit` runs, kept in a file, read again."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import keras

from gemma2_keras.errors import CheckpointError, warn
from gemma2_keras.training.token_dataset import TokenDataset


@dataclasses.dataclass
class TrainingHistory:
    """What a run has shown so far.

    Attributes:
        steps: for each step `"step"`, counted from 1 over the whole run; `"epoch"`, counted from 0; `"batch"`, counted
            from 1 in its epoch; `"loss"`, of this step alone; `"mean_loss"`, Keras' mean since the epoch began; and
            `"tokens"`, how many were no padding, where the data say so.
        epochs: for each epoch `"epoch"` and what Keras shows at its end, such as `"loss"` and `"val_loss"`.

    Example:

    >>> history = TrainingHistory(epochs=[{"epoch": 0, "loss": 2.0}, {"epoch": 1, "loss": 1.5}])
    >>> history.history
    {'loss': [2.0, 1.5]}
    """

    steps: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    epochs: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def history(self) -> dict[str, list[float]]:
        """The epochs as `keras.callbacks.History` has them: a list for each name."""
        names = dict.fromkeys(name for epoch in self.epochs for name in epoch if name != "epoch")
        return {name: [epoch[name] for epoch in self.epochs if name in epoch] for name in names}

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [step["loss"] for step in self.steps]

    @classmethod
    def read(cls, path: str | os.PathLike) -> TrainingHistory:
        """The history that `RunHistory` wrote to a file; a last line that was cut off is passed over.

        Raises:
            CheckpointError: if the file is missing, or holds something else.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as the history of a run: {error}") from error
        history = cls()
        # What follows the last line break is a line whose writing was interrupted.
        for number, line in enumerate(lines[:-1], start=1):
            try:
                entry = json.loads(line)
                (history.steps if "step" in entry else history.epochs).append(entry | {"epoch": int(entry["epoch"])})
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise CheckpointError(f"{path}, line {number}, is no line of a run's history.") from error
        return history


class RunHistory(keras.callbacks.Callback):
    """Notes the loss of each step and the results of each epoch, in memory and, line by line, in a file.

    Keras itself reports the mean since the epoch began; the loss of a step is the difference of two sums.

    Args:
        path: of a file of JSON lines; one that exists is continued. `None` keeps the history in memory alone.
        data: the `TokenDataset` that is trained on, to count tokens and to go on in the middle of an epoch.

    Attributes:
        noted: the `TrainingHistory`.

    Example:

    >>> from gemma2_keras import Gemma2CausalLM
    >>> model = Gemma2CausalLM.from_preset("gemma2_tiny_en")
    >>> model.compile("sgd")
    >>> history = RunHistory()
    >>> _ = model.fit(["A cat.", "A dog.", "A hen."], batch_size=1, callbacks=[history], verbose=0)
    >>> len(history.noted.losses)
    3
    """

    def __init__(self, path: str | os.PathLike | None = None, data: TokenDataset | None = None) -> None:
        super().__init__()
        self._path = None if path is None else Path(path)
        self._data = data
        self.noted = TrainingHistory()
        # Lines that are not in the file yet, and how long the file is up to its last whole line.
        self._pending: list[str] = []
        self._length = 0
        if self._path is not None and self._path.exists():
            self.noted = TrainingHistory.read(self._path)
            self._length = self._path.read_bytes().rfind(b"\n") + 1
        self._first_batch = 0

    def go_back_to(self, epoch: int, step: int) -> None:
        """Forget what came after so many steps of the whole run, and the results of this epoch and later ones."""
        noted = self.noted
        self.noted = TrainingHistory(
            [entry for entry in noted.steps if entry["step"] <= step],
            [entry for entry in noted.epochs if entry["epoch"] < epoch],
        )
        if self._path is not None and self.noted != noted:
            lines = [_line(entry) for entry in sorted([*self.noted.steps, *self.noted.epochs], key=_order)]
            beside = self._path.with_name(f".{self._path.name}")
            with open(beside, "w", encoding="utf-8") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
            self._pending, self._length = [], sum(len(line.encode()) for line in lines)

    def on_epoch_begin(self, epoch, logs=None) -> None:
        """Begin the mean anew, as Keras does, or go on within the epoch."""
        self._epoch = epoch
        self._first_batch = 0 if self._data is None else self._data.first_step
        self._seen, mean = 0, 0.0
        if self._first_batch and self.noted.steps and self.noted.steps[-1]["epoch"] == epoch:
            self._seen, mean = self.noted.steps[-1]["batch"], self.noted.steps[-1]["mean_loss"]
        self._sum = self._seen * mean

    def on_train_batch_end(self, batch, logs=None) -> None:
        """Take the new sum less the old one."""
        logs = logs or {}
        seen, mean = self._first_batch + batch + 1, float(logs["loss"])
        taken = seen - self._seen
        step = (self.noted.steps[-1]["step"] if self.noted.steps else 0) + taken
        loss = (mean * seen - self._sum) / taken
        entry = {"step": step, "epoch": self._epoch, "batch": seen, "loss": loss, "mean_loss": mean}
        if self._data is not None:
            entry["tokens"] = sum(self._data.num_tokens(batch - i) for i in range(taken))
        self._seen, self._sum = seen, mean * seen
        self.noted.steps.append(entry)
        self._write(entry)

    def on_epoch_end(self, epoch, logs=None) -> None:
        """Note the results of the epoch."""
        entry = {"epoch": epoch, **{name: float(value) for name, value in (logs or {}).items()}}
        self.noted.epochs.append(entry)
        self._write(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        """Append a line; one that a full disk does not take is written with a later one."""
        if self._path is None:
            return
        self._pending.append(_line(entry))
        content = "".join(self._pending).encode()
        try:
            with open(self._path, "ab") as file:
                if file.tell() < self._length:
                    raise OSError(f"{self._path} was shortened or removed by another.")
                # Half a line may stand there since the last attempt.
                file.truncate(self._length)
                file.write(content)
        except OSError as error:
            if len(self._pending) == 1:
                warn(f"The history of the run cannot be written for now: {error}")
            return
        self._length += len(content)
        self._pending = []


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _order(entry: dict[str, Any]) -> tuple[int, float]:
    return entry["epoch"], entry.get("batch", float("inf"))
