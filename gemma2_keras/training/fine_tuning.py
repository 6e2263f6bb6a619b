"""Long runs: `fit`, with progress, checkpoints, and a way back after an interruption."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import keras

from gemma2_keras.errors import InputError, warn
from gemma2_keras.tasks.sources import unpacked
from gemma2_keras.training.checkpoints import RunCheckpoints, random_states, set_random_states
from gemma2_keras.training.history import RunHistory, TrainingHistory
from gemma2_keras.training.progress import TrainingProgress
from gemma2_keras.training.run_folder import Position
from gemma2_keras.training.token_dataset import TokenDataset


def fine_tune(
    model: Any,
    data: TokenDataset,
    *,
    epochs: int = 1,
    validation_data: Any = None,
    folder: str | os.PathLike | None = None,
    resume: bool = False,
    every_steps: int | None = None,
    every_minutes: float | None = 10.0,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: Any = "auto",
) -> TrainingHistory:
    """Train by `fit`, so that the run can be interrupted at any moment and goes on with the same loss curve.

    The folder gets checkpoints, of which the two newest whole ones are kept, and the curve. What is not kept is the
    state of `callbacks`, such as the patience of `EarlyStopping`: they begin anew.

    Ctrl-C, and whatever the system asks a process to end with, waits for the step that is under way, and writes a
    checkpoint; a second Ctrl-C does not wait. An error of the data is raised once a checkpoint is written, too.

    Args:
        model: a compiled `Gemma2CausalLM`, with adapters or without.
        data: what is trained on.
        epochs: how many times all of the data is gone through, counted from the beginning of the run.
        validation_data: as `fit` takes it; its loss, accuracy and perplexity are shown for each epoch.
        folder: where the run is kept; `None` keeps nothing.
        resume: whether the run in `folder` goes on; if there is none there, it begins.
        every_steps: a checkpoint after so many steps; `None` for none.
        every_minutes: a checkpoint after so many minutes; `None` for none.
        callbacks: Keras' own, or yours.
        verbose: 0 shows nothing, 1 or "auto" the progress, 2 a line for each epoch.

    Returns:
        The loss of each step and the results of each epoch, from the beginning of the run.

    Raises:
        InputError: if an argument is not what it should be, or the run in `folder` is of another model, optimizer, loss
            or data; nothing is changed then.
        FileExistsError: if `folder` holds a run, and `resume` is false, or if another process is training it.
        CheckpointError: if the run in `folder` cannot be read.

    Example:

    >>> import tempfile
    >>> import numpy as np
    >>> from gemma2_keras import Gemma2CausalLM
    >>> model = Gemma2CausalLM.from_preset("gemma2_tiny_en")
    >>> model.enable_lora(rank=4)
    >>> model.compile("adam")
    >>> x = {"token_ids": np.ones((4, 8), "int32"), "padding_mask": np.ones((4, 8), "int32")}
    >>> data = TokenDataset(x, x["token_ids"], np.ones((4, 8), "float32"), batch_size=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = fine_tune(model, data, folder=folder, verbose=0)
    ...     history = fine_tune(model, data, epochs=2, folder=folder, resume=True, verbose=0)
    >>> len(history.losses)
    4
    """
    if not isinstance(data, TokenDataset):
        raise InputError(f"`data` must be a TokenDataset; given {type(data).__name__}.")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise InputError(f"`epochs` must be a whole number of at least 1; given {epochs!r}.")
    if isinstance(callbacks, keras.callbacks.Callback) or not isinstance(callbacks, Sequence):
        raise InputError(f"`callbacks` must be a list of callbacks; given {type(callbacks).__name__}.")
    if not isinstance(model, keras.Model):
        raise InputError(f"`model` must be a Gemma2CausalLM; given {type(model).__name__}.")
    if not model.compiled:
        raise InputError("The model is not compiled: call `model.compile(optimizer=…)` first.")
    if resume and folder is None:
        raise InputError("`resume=True` needs the `folder` of the run.")
    # Otherwise `fit` would find them, and replace the optimizer that was restored.
    model.notice_adapters()
    run = (model, data, epochs, validation_data, callbacks, verbose)
    if folder is None:
        return _train(*run)
    checkpoints = RunCheckpoints(folder, data, every_steps=every_steps, every_minutes=every_minutes, resume=resume)
    try:
        return _train(*run, checkpoints)
    finally:
        checkpoints.folder.let_go()


def _train(
    model: Any,
    data: TokenDataset,
    epochs: int,
    validation_data: Any,
    callbacks: Sequence[keras.callbacks.Callback],
    verbose: Any,
    checkpoints: RunCheckpoints | None = None,
) -> TrainingHistory:
    """Train from where the run is."""
    position = Position()
    history = RunHistory(data=data)
    if checkpoints is not None:
        position = checkpoints.restore(model)
        history = RunHistory(checkpoints.folder.history_file, data)
        history.go_back_to(position.epoch, position.step)
        if checkpoints.open_results is not None:
            # Interrupted in the validation of an epoch.
            results = dict(checkpoints.open_results)
            if validation_data is not None:
                x, y, weights = unpacked(validation_data)
                options = {"batch_size": data.batch_size, "sample_weight": weights, "verbose": 0, "return_dict": True}
                found = model.evaluate(x, y, **options)
                results |= {f"val_{name}": value for name, value in found.items()}
            history.on_epoch_end(position.epoch, results)
            checkpoints.close_epoch()
            position = checkpoints.position
    feed = _Feed(model, data, position)
    stop = _Stop()
    ours = [] if checkpoints is None else [checkpoints]
    progress = TrainingProgress(data, epochs)
    watching = [_Order(feed), history, *callbacks, *ours, progress, stop]
    # The rest of an epoch is a `fit` of its own, for Keras takes all epochs to have the same number of steps.
    broken_off = min(position.epoch + (position.batch > 0), epochs)
    try:
        with stop.listening():
            for first, last in ((position.epoch, broken_off), (broken_off, epochs)):
                if first < last and not stop.ended_early:
                    data.start_at(first, feed.first_batch(first))
                    model.fit(
                        feed,
                        epochs=last,
                        initial_epoch=first,
                        validation_data=validation_data,
                        validation_batch_size=data.batch_size,
                        callbacks=watching,
                        verbose=verbose,
                        shuffle=False,
                    )
    except BaseException:
        if checkpoints is not None and checkpoints.between_steps:
            try:
                checkpoints.write()
            except Exception as error:
                # The error that ended the run is the one to tell of.
                warn(f"No checkpoint of the last step could be written: {error}")
        stop.send_again()
        raise
    return history.noted


class _Feed(keras.utils.PyDataset):
    """The data as `fit` takes them; each batch is made before its step begins, where an error harms nothing."""

    def __init__(self, model: Any, data: TokenDataset, start: Position) -> None:
        super().__init__()
        self._model, self._data, self._start = model, data, start
        self._lock = threading.Lock()
        self._made: dict[int, Any] = {}

    @property
    def num_batches(self) -> int:
        return self._data.num_batches

    def first_batch(self, epoch: int) -> int:
        """With which batch an epoch begins in this run."""
        return self._start.batch if epoch == self._start.epoch else 0

    def begin(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self._made = {}
        self._data.start_at(epoch, self.first_batch(epoch))

    def prepare(self, index: int) -> None:
        """Make a batch, if it has not been asked for yet, and forget those before it."""
        self[index]
        with self._lock:
            self._made = {i: batch for i, batch in self._made.items() if i >= index}
            if isinstance(error := self._made[index], Exception):
                raise error

    def __getitem__(self, index: int) -> Any:
        """One batch, made once; in place of one that cannot be made, another, which is never trained on."""
        with self._lock:
            if index not in self._made:
                try:
                    self._made[index] = self._model.preprocess_samples(*self._data[index])
                except Exception as error:
                    if index == 0:
                        raise
                    self._made[index] = error
            batch = self._made[index]
            if isinstance(batch, Exception):
                batch = self._model.preprocess_samples(*self._data[0])
            return batch


class _Order(keras.callbacks.Callback):
    """Begins each epoch of the data, and has each batch made before its step.

    Training goes on as if a validation had drawn no random numbers, as with `RunCheckpoints`.
    """

    def __init__(self, feed: _Feed) -> None:
        super().__init__()
        self._feed = feed
        self._random: list[Any] = []

    def on_train_batch_end(self, batch, logs=None) -> None:
        self._random = random_states() if batch + 1 == self.params["steps"] else []

    def on_epoch_end(self, epoch, logs=None) -> None:
        set_random_states(self._random)

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self._feed.begin(epoch)

    def on_train_batch_begin(self, batch, logs=None) -> None:
        self._feed.prepare(batch)


class _Stop(keras.callbacks.Callback):
    """Ends a run between two steps when the process is asked to end; last of the callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.ended_early = False
        self._signal: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals instead of obeying them at once; a second one is obeyed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}

        def note(number: int, frame: FrameType | None) -> None:
            self._signal = number
            signal.signal(number, before[signal.Signals(number)])
            print("\nThe run ends after this step; once more ends it at once.", flush=True)

        try:
            for number in before:
                signal.signal(number, note)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def send_again(self) -> None:
        """Have a signal other than Ctrl-C, whose exception is under way, do what it does otherwise."""
        if self._signal not in (None, signal.SIGINT):
            signal.raise_signal(self._signal)

    def on_train_batch_end(self, batch, logs=None) -> None:
        # Behind the last step of an epoch its validation begins first, or the epoch ends.
        if batch + 1 < self.params["steps"]:
            self._end_if_asked()

    def on_test_batch_end(self, batch, logs=None) -> None:
        self._end_if_asked()

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.ended_early = self.model.stop_training
        self._end_if_asked()

    def _end_if_asked(self) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt
