"""A run's state out of the model and back, and when it is written."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections import defaultdict
from typing import Any

import keras
import numpy as np
from keras import ops

from gemma2_keras.errors import CheckpointError, InputError, warn
from gemma2_keras.training.run_folder import Position, RunFolder, RunState
from gemma2_keras.training.token_dataset import TokenDataset


class RunCheckpoints(keras.callbacks.Callback):
    """Writes checkpoints of a run while `fit` trains, so that it can go on as if it had not been interrupted.

    A checkpoint has the trainable weights (with LoRA, the adapters alone), the optimizer's variables, the states of
    random generators, the metrics, and how far the data were read; the two newest are kept. One is written before the
    first step, when one is due, and at the end. If the disk is full, training goes on with a warning.

    `fine_tune` uses it, and goes on in the middle of an epoch, too. By itself, after `restore`, `fit` needs
    `initial_epoch` and `shuffle=False`, and where an epoch was broken off, the rest of it by a call of its own.

    Args:
        folder: of the run. It may hold other files, but no other run.
        data: the `TokenDataset` that is trained on.
        every_steps: a checkpoint after so many steps; `None` for none.
        every_minutes: a checkpoint after so many minutes; `None` for none. One that falls on the end of an epoch is
            written after its validation.
        resume: whether the run in `folder` goes on; if there is none, it begins.

    Attributes:
        position: how far the run has come.

    Raises:
        InputError: if `data` is no `TokenDataset`, or an interval is not above 0.
        FileExistsError: if the folder holds a run, and `resume` is false.

    Example:

    >>> import tempfile
    >>> from gemma2_keras import Gemma2CausalLM
    >>> model = Gemma2CausalLM.from_preset("gemma2_tiny_en")
    >>> model.enable_lora(rank=4)
    >>> model.compile("adam")
    >>> x = {"token_ids": np.ones((4, 8), "int32"), "padding_mask": np.ones((4, 8), "int32")}
    >>> data = TokenDataset(x, x["token_ids"], np.ones((4, 8), "float32"), batch_size=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = model.fit(data, callbacks=[RunCheckpoints(folder, data)], shuffle=False, verbose=0)
    ...     RunCheckpoints(folder, data, resume=True).restore(model)
    Position(epoch=1, batch=0, step=2)
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        data: TokenDataset,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = 10.0,
        resume: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(data, TokenDataset):
            raise InputError(f"`data` must be a TokenDataset, whose order can be found again; given {type(data)}.")
        for name, value in (("every_steps", every_steps), ("every_minutes", every_minutes)):
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise InputError(f"`{name}` must be above 0, or None; given {value!r}.")
        self.folder = RunFolder(folder)
        if not resume:
            self.folder.refuse_a_run()
        self.position = Position()
        self._data = data
        self._every_steps, self._every_minutes = every_steps, every_minutes
        self._identity: dict[str, Any] = {}
        # What is restored, until `fit` has reset metrics, and made its iterator, which on PyTorch draws a number.
        self._metrics: list[np.ndarray] = []
        self._random: list[np.ndarray] = []
        # As it was when the validation of the epoch began, which is done again.
        self._random_before_test: list[Any] = []
        self._results: dict[str, float] = {}
        self._written: Position | None = None
        self._written_at = 0.0
        self._between_steps = True
        self._restored = False

    @property
    def between_steps(self) -> bool:
        """Whether the model's state is that of a step that is complete."""
        return self._between_steps

    @property
    def open_results(self) -> dict[str, float] | None:
        """What the last step of an epoch showed, if the epoch is not closed: its validation is missing."""
        return self._results if self.position.batch == self._data.batches_per_epoch else None

    def restore(self, model: Any) -> Position:
        """Bring model, optimizer and data to where the newest whole checkpoint was; without one, leave them.

        Args:
            model: a compiled `Gemma2CausalLM`, with the adapters it had when the run began.

        Raises:
            InputError: if the run is of another model, optimizer, loss or data. Model and folder are then unchanged.
            CheckpointError: if no checkpoint can be read, or it does not fit the model.
            FileExistsError: if another process is training the run.
        """
        self.set_model(model)
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        self._identity = _identity(model, self._data)
        self.folder.hold()
        state = self.folder.read(self._identity)
        self.folder.clean()
        self._restored = True
        if state is not None:
            self._metrics, self._random = _assign(model, state.tensors)
            self.position = self._written = state.position
            self._results = state.results
            if self.open_results is None:
                self._data.start_at(self.position.epoch, self.position.batch)
        return self.position

    def write(self) -> None:
        """Write a checkpoint of the step last completed, unless it is there already.

        Raises:
            OSError: if it cannot be written; the earlier ones are then as they were.
        """
        if self.position != self._written:
            random = random_states() if self.open_results is None else self._random_before_test
            state = RunState(self.position, self._identity, _tensors(self.model, random), self._results)
            self.folder.write(state)
            self._written = self.position
        self._written_at = time.monotonic()

    def close_epoch(self) -> None:
        """Count the epoch as done, once it is validated."""
        self.position = Position(self.position.epoch + 1, 0, self.position.step)
        self._results = {}

    def on_train_begin(self, logs=None) -> None:
        """Restore, if that was not done, and write the first checkpoint."""
        if not self._restored:
            self.restore(self.model)
        self.folder.hold()
        # Fails here, not hours later, if the folder cannot be written to.
        self.write()

    def on_epoch_begin(self, epoch, logs=None) -> None:
        """Bring data and metrics to where they were.

        Raises:
            InputError: if `fit` begins with another epoch than the one where the run is, or with other steps.
        """
        if epoch != self.position.epoch:
            raise InputError(f"The run goes on in epoch {self.position.epoch}; give `fit` that `initial_epoch`.")
        first = self.position.batch
        if first and (self.params["epochs"], self.params["steps"]) != (epoch + 1, self._data.batches_per_epoch - first):
            raise InputError(
                f"The run was broken off in epoch {epoch}: train the rest of it with `epochs={epoch + 1}`, then call "
                "`fit` for the others; `fine_tune` does both."
            )
        self._data.start_at(epoch, first)
        if first and self._metrics:
            _assign_all(_metrics_of(self.model, len(self._metrics), self._data), self._metrics)
        if not first:
            self._set_random()
        self._metrics = []

    def on_train_batch_begin(self, batch, logs=None) -> None:
        """Note that a step is under way."""
        self._set_random()
        self._between_steps = False

    def on_train_batch_end(self, batch, logs=None) -> None:
        """Count the step, and write a checkpoint if one is due."""
        made = self._data.first_step + batch + 1 - self.position.batch
        epoch, last, step = self.position
        self.position = Position(epoch, last + made, step + made)
        self._between_steps = True
        if self.position.batch < self._data.batches_per_epoch:
            self._write_if_due()
        else:
            self._results = dict(logs or {})
            self._random_before_test = random_states()

    def on_epoch_end(self, epoch, logs=None) -> None:
        """Count the epoch, and write a checkpoint if one is due."""
        # `stop_training` may have ended it early.
        if self.position.batch == self._data.batches_per_epoch:
            self.close_epoch()
            # A validation draws as many random numbers as it likes: training goes on as if it had drawn none.
            set_random_states(self._random_before_test)
        self._write_if_due()

    def on_train_end(self, logs=None) -> None:
        """Write the last checkpoint, and let others go on with the run."""
        self._write_or_warn()
        self.folder.let_go()

    def _set_random(self) -> None:
        set_random_states(self._random)
        self._random = []

    def _write_if_due(self) -> None:
        written = 0 if self._written is None else self._written.step
        by_steps = self._every_steps is not None and self.position.step - written >= self._every_steps
        minutes = (time.monotonic() - self._written_at) / 60
        if by_steps or (self._every_minutes is not None and minutes >= self._every_minutes):
            self._write_or_warn()

    def _write_or_warn(self) -> None:
        try:
            self.write()
        except OSError as error:
            warn(
                f"The checkpoint of step {self.position.step} cannot be written ({error}); the run goes on, and "
                f"{self.folder.path} keeps that of step {0 if self._written is None else self._written.step}."
            )


def _identity(model: Any, data: TokenDataset) -> dict[str, Any]:
    """What a run is of, as plain values."""
    trainable = {id(variable) for variable in model.trainable_variables}
    frozen = hashlib.sha256()
    for variable in model.weights:
        if id(variable) not in trainable:
            # The first row tells one checkpoint from another; the whole would take a while.
            row = variable[0] if len(variable.shape) > 1 else variable
            frozen.update(ops.convert_to_numpy(ops.cast(row, "float32")).tobytes())
    backbone = model.backbone
    adapter = backbone.active_adapter
    specs = {} if adapter is None else backbone.adapter_specs(adapter)
    optimizer = keras.optimizers.serialize(model.optimizer)
    loss = model.loss
    return {
        "model": backbone.config.to_dict(),
        "frozen_weights": frozen.hexdigest(),
        "trainable_weights": {v.path: f"{v.dtype} {tuple(v.shape)}" for v in model.trainable_variables},
        "adapter": {module: dataclasses.asdict(spec) for module, spec in specs.items()},
        "optimizer": {"class": optimizer["class_name"], **_without_name(optimizer["config"])},
        "loss": keras.losses.serialize(loss)["config"] if isinstance(loss, keras.losses.Loss) else str(loss),
        "data": {
            "examples": len(data),
            "digest": data.digest,
            "batch_size": data.batch_size,
            "shuffle": data.shuffle,
            "seed": data.seed,
        },
    }


def _without_name(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "name"}


def _state_variables(model: Any) -> dict[str, list[Any]]:
    """What a step changes, besides metrics; seeds are variables that are no weights."""
    weights = {id(variable) for variable in model.weights}
    return {
        "trainable": model.trainable_variables,
        "optimizer": model.optimizer.variables,
        "seed": [variable for variable in model.variables if id(variable) not in weights],
    }


def _tensors(model: Any, random: list[Any]) -> dict[str, np.ndarray]:
    groups = {**_state_variables(model), "metric": model.metrics_variables, "random": random}
    return {
        f"{group}.{i:05d}": np.asarray(ops.convert_to_numpy(value), order="C")
        for group, values in groups.items()
        for i, value in enumerate(values)
    }


def random_states() -> list[Any]:
    """The states of the backend's own generators; Keras' dropout draws from PyTorch's, and so does reading data."""
    if keras.backend.backend() != "torch":
        return []
    import torch

    return [state.numpy() for state in (torch.get_rng_state(), *torch.cuda.get_rng_state_all())]


def set_random_states(states: list[np.ndarray]) -> None:
    """Set them, unless the run was on another backend, or on other devices."""
    if not states or len(states) != len(random_states()):
        return
    import torch

    cpu, *cuda = (torch.from_numpy(state) for state in states)
    torch.set_rng_state(cpu)
    torch.cuda.set_rng_state_all(cuda)


def _assign(model: Any, tensors: dict[str, np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Assign all but metrics and random states, which are returned; nothing is assigned unless everything fits."""
    groups: dict[str, list[np.ndarray]] = defaultdict(list)
    for name in sorted(tensors):
        groups[name.partition(".")[0]].append(tensors[name])
    variables = _state_variables(model)
    for group, wanted in variables.items():
        shapes = [tuple(variable.shape) for variable in wanted]
        held = [array.shape for array in groups[group]]
        if shapes != held:
            raise CheckpointError(
                f"The checkpoint has {len(held)} {group} variables, which are not the {len(shapes)} of the model."
            )
    for group, wanted in variables.items():
        _assign_all(wanted, groups[group])
    return groups["metric"], groups["random"]


def _assign_all(variables: list[Any], values: list[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _metrics_of(model: Any, count: int, data: TokenDataset) -> list[Any]:
    """The variables of metrics; some are made when a metric first sees numbers."""
    if len(model.metrics_variables) != count:
        x, y, sample_weight = data[0]
        model.compute_metrics(x, y, model(x, training=False), sample_weight)
    return model.metrics_variables
