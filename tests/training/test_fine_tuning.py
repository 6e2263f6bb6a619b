"""Runs that are interrupted, go on, or must not."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from safetensors import SafetensorError

from gemma2_keras import Gemma2CausalLM, RunCheckpoints, TokenDataset, TrainingHistory, fine_tune
from gemma2_keras.checkpoints.saving import lock
from gemma2_keras.errors import CheckpointError, InputError
from gemma2_keras.training import run_folder
from tests.training import small

EPOCHS = 2
STEPS = 5  # of an epoch


class At(keras.callbacks.Callback):
    """Does something behind a step of training, or of validation, counted from 1."""

    def __init__(self, action, step=0, validation_step=0) -> None:
        super().__init__()
        self.action = action
        self.left, self.validation_left = step, validation_step

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()

    def on_test_batch_end(self, batch, logs=None) -> None:
        self.validation_left -= 1
        if self.validation_left == 0:
            self.action()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def run(model, folder=None, data=None, epochs=EPOCHS, **options) -> TrainingHistory:
    data = small.data() if data is None else data
    validation = small.data(4, seed=5, shuffle=False)
    options = {"validation_data": validation, "every_steps": 2, "verbose": 0, **options}
    return fine_tune(model, data, epochs=epochs, folder=folder, **options)


@pytest.fixture(scope="module")
def whole(adapters):
    """The history and the weights of a run that nothing interrupts."""
    return run(adapters.fresh()), adapters.weights()


@pytest.fixture(scope="module")
def interrupted(adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        run(adapters.fresh(), folder, callbacks=[At(interrupt, 3)])
    return folder


@pytest.fixture
def begun(interrupted, tmp_path):
    """A run that was interrupted behind its third step."""
    return shutil.copytree(interrupted, tmp_path / "run")


def assert_goes_on(runs, folder, whole, **options):
    """Resumed from other weights, seeds and position, it is the whole run."""
    keras.utils.set_random_seed(99)
    history = run(runs.model, folder, resume=True, **options)
    assert history == whole[0]
    assert TrainingHistory.read(folder / "history.jsonl") == whole[0]
    for found, expected in zip(runs.weights(), whole[1], strict=True):
        np.testing.assert_array_equal(found, expected)


def checkpoints(folder):
    return sorted(int(path.name[-8:]) for path in folder.glob("checkpoint-*"))


def test_interrupted_run_goes_on(adapters, begun, whole):
    assert checkpoints(begun) == [2, 3]
    adapters.fresh()
    assert_goes_on(adapters, begun, whole)
    assert checkpoints(begun) == [9, 10]


def test_run_interrupted_in_validation_goes_on(adapters, tmp_path, whole):
    with pytest.raises(KeyboardInterrupt):
        run(adapters.fresh(), tmp_path, callbacks=[At(interrupt, validation_step=1)])
    assert checkpoints(tmp_path) == [4, 5]
    assert TrainingHistory.read(tmp_path / "history.jsonl").epochs == []
    adapters.fresh()
    assert_goes_on(adapters, tmp_path, whole)


@pytest.mark.parametrize("callback", ["on_test_begin", "on_test_batch_end", "on_test_end", "on_epoch_end"])
def test_dropout_after_an_interrupted_validation_is_that_of_the_whole_run(tmp_path, callback):
    def made():
        model = small.model(dropout=0.3)
        model.optimizer.build(model.trainable_variables)
        keras.utils.set_random_seed(5)
        return model

    x, y, weight = small.data(9, seed=5, shuffle=False)[0]
    arrays = (x, y, weight)
    expected = run(made(), validation_data=arrays)
    once = keras.callbacks.Callback()
    setattr(once, callback, lambda *_, **__: setattr(once, callback, lambda *_, **__: None) or interrupt())
    with pytest.raises(KeyboardInterrupt):
        run(made(), tmp_path, callbacks=[once], validation_data=arrays)
    assert run(made(), tmp_path, resume=True, validation_data=arrays) == expected


def test_run_of_the_whole_model_goes_on(whole_model, tmp_path):
    expected = run(whole_model.fresh()), whole_model.weights()
    with pytest.raises(KeyboardInterrupt):
        run(whole_model.fresh(), tmp_path, callbacks=[At(interrupt, 7)])
    whole_model.fresh()
    assert_goes_on(whole_model, tmp_path, expected)


def test_handlers_of_signals_come_back(adapters, begun):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_request_to_end_is_obeyed_behind_a_checkpoint(adapters, tmp_path):
    found = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: found.append(checkpoints(tmp_path)))
    try:
        terminate = At(lambda: os.kill(os.getpid(), signal.SIGTERM), 3)
        with pytest.raises(KeyboardInterrupt):
            run(adapters.fresh(), tmp_path, callbacks=[terminate], validation_data=None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == [[2, 3]]


def test_error_within_a_step_writes_nothing(adapters, tmp_path):
    """On JAX the state of the step before is gone by then."""

    class Fails(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                raise RuntimeError("within a step")

    data = small.data()
    written = RunCheckpoints(tmp_path, data, every_steps=2)
    with pytest.raises(RuntimeError, match="within a step"):
        adapters.fresh().fit(data, callbacks=[written, Fails()], shuffle=False, verbose=0)
    assert not written.between_steps
    assert checkpoints(tmp_path) == [0, 2]


class Broken(TokenDataset):
    """Its fourth batch cannot be made, until it is mended."""

    whole = False

    def __getitem__(self, index):
        if self.first_step + index == 3 and not self.whole:
            raise RuntimeError("the fourth batch is broken")
        return super().__getitem__(index)


def test_data_that_break_off_keep_the_last_step(adapters, tmp_path, whole):
    data = small.data(cls=Broken)
    with pytest.raises(RuntimeError, match="the fourth batch is broken"):
        run(adapters.fresh(), tmp_path, data, every_steps=None)
    assert checkpoints(tmp_path) == [0, 3]
    data.whole = True
    adapters.fresh()
    assert_goes_on(adapters, tmp_path, whole, data=data)


def test_bad_ids_in_the_middle_keep_the_last_step(adapters, tmp_path):
    data = small.data(shuffle=False)
    data.x["token_ids"][7] = 31
    with pytest.raises(InputError, match="31"):
        run(adapters.fresh(), tmp_path, data, every_steps=None)
    assert checkpoints(tmp_path) == [0, 3]


@pytest.mark.parametrize("kind", [functools.partial(OSError, errno.ENOSPC), SafetensorError])
def test_full_disk_stops_nothing(adapters, tmp_path, monkeypatch, whole, kind):
    written = []

    def save(tensors, path):
        written.append(path)
        if len(written) in (3, 4):
            path.write_bytes(b"half")
            raise kind("No space left on device")
        original(tensors, path)

    original = run_folder.save_file
    monkeypatch.setattr(run_folder, "save_file", save)
    with pytest.warns(UserWarning, match=r"step [45] cannot be written .*keeps that of step 2") as warned:
        history = run(adapters.fresh(), tmp_path)
    assert history == whole[0]
    assert sum("cannot be written" in str(warning.message) for warning in warned) == 2
    assert checkpoints(tmp_path) == [8, 10]
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]


def test_full_disk_at_the_beginning_is_raised(adapters, tmp_path, monkeypatch):
    def save(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "save_file", save)
    with (
        pytest.warns(UserWarning, match="No checkpoint of the last step"),
        pytest.raises(OSError, match="No space left"),
    ):
        run(adapters.fresh(), tmp_path)


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_damaged_checkpoint_gives_way_to_the_one_before(adapters, begun, file, damage):
    newest = begun / "checkpoint-00000003"
    content = (newest / file).read_bytes()
    if damage == "gone":
        (newest / file).unlink()
    else:
        middle = len(content) // 2
        changed = bytes([content[middle] ^ 1])
        (newest / file).write_bytes(
            content[:middle] + (changed + content[middle + 1 :] if damage == "changed" else b"")
        )
    fresh = RunCheckpoints(begun, small.data(), resume=True)
    with pytest.warns(UserWarning, match="checkpoint-00000003.*The checkpoint before it is used, of step 2"):
        assert fresh.restore(adapters.fresh()) == (0, 2, 2)
    assert checkpoints(begun) == [2]


def test_run_goes_on_from_the_checkpoint_before(adapters, begun, whole):
    (begun / "checkpoint-00000003" / "state.safetensors").write_bytes(b"")
    adapters.fresh()
    with pytest.warns(UserWarning, match="The checkpoint before it is used"):
        assert_goes_on(adapters, begun, whole)


def test_nothing_whole_is_said_and_kept(adapters, begun):
    for path in begun.glob("checkpoint-*"):
        (path / "state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="No checkpoint of the run can be read"):
        run(adapters.fresh(), begun, resume=True)
    assert checkpoints(begun) == [2, 3]


def test_history_without_checkpoints_is_kept(adapters, begun):
    for path in begun.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="has the history of a run and no checkpoint"):
        run(adapters.fresh(), begun, resume=True)
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(adapters.fresh(), begun)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_beginning_anew_is_refused(adapters, begun):
    before = contents(begun)
    with pytest.raises(FileExistsError, match=r"holds a run already: go on with it by `resume=True`, or choose"):
        run(adapters.fresh(), begun)
    assert contents(begun) == before


HOLDS = """
import sys
from gemma2_keras.training.run_folder import RunFolder
RunFolder(sys.argv[1]).hold()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.once
def test_run_of_another_process_is_left_alone(adapters, begun, whole):
    pytest.importorskip("fcntl")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(begun)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        before = contents(begun)
        with pytest.raises(FileExistsError, match="Another process is training the run"):
            run(adapters.fresh(), begun, resume=True)
        assert contents(begun) == before
        other.kill()
    assert_goes_on(adapters, begun, whole)
    # And once it is done, this process lets others go on with it.
    with open(begun / ".lock") as file:
        assert lock(file.fileno(), wait=False)


def test_file_as_folder_is_refused(adapters, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(FileExistsError, match="is no folder"):
        run(adapters.fresh(), tmp_path / "run")


def other_weights():
    model = small.model()
    model.backbone.layer_norm.weight.assign(np.full(24, 0.5))
    model.backbone.token_embedding.embeddings.assign(np.zeros((31, 24)))
    return model


def two_adapters():
    model = small.model()
    model.enable_lora(3, name="second")
    return model


@pytest.mark.parametrize(
    ("make", "data", "named"),
    [
        (small.model, {"seed": 1}, "its data differ ('data.digest' was"),
        (small.model, {"examples": 8}, "its data differ ('data.digest' was"),
        (small.model, {"batch_size": 3}, "its data differ ('data.batch_size' was 2 and is 3)"),
        (small.model, {"shuffle": False}, "its data differ ('data.shuffle' was True and is False)"),
        (other_weights, {}, "its frozen weights differ"),
        (two_adapters, {}, "its frozen weights, trainable weights, adapter differ ('adapter.model.layers.0"),
        (lambda: small.model(lora=False), {}, "its frozen weights, trainable weights, adapter differ"),
        (lambda: small.model(optimizer=keras.optimizers.Adam(0.01)), {}, "its optimizer differ ('optimizer.learning_"),
        (lambda: small.model(optimizer=keras.optimizers.SGD(0.02)), {}, "its optimizer differ ('optimizer.class' was"),
    ],
)
def test_run_of_something_else_is_refused(begun, make, data, named):
    before = contents(begun)
    model = make()
    weights = [keras.ops.convert_to_numpy(v).copy() for v in model.weights]
    with pytest.raises(InputError, match="is of something else") as raised:
        run(model, begun, small.data(**data), resume=True)
    assert named in str(raised.value)
    assert "Nothing was changed" in str(raised.value)
    assert contents(begun) == before
    for variable, value in zip(model.weights, weights, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)


def test_resume_in_an_empty_folder_begins(adapters, tmp_path, whole):
    assert run(adapters.fresh(), tmp_path / "new", resume=True) == whole[0]


def test_what_a_killed_process_left_is_removed(adapters, begun):
    left = begun / ".checkpoint-00000004.0123abcd"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half")
    RunCheckpoints(begun, small.data(), resume=True).restore(adapters.fresh())
    assert not left.exists()


def test_more_epochs_can_follow(adapters, tmp_path, whole):
    run(adapters.fresh(), tmp_path, epochs=1)
    adapters.fresh()
    assert_goes_on(adapters, tmp_path, whole)
    # It is at its end: nothing more is trained.
    assert_goes_on(adapters, tmp_path, whole)


def test_folder_changes_nothing_in_the_run(adapters, tmp_path, whole):
    (tmp_path / "notes.txt").write_text("mine")
    assert run(adapters.fresh(), tmp_path) == whole[0]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_callback_by_itself(adapters, tmp_path, whole):
    data, validation = small.data(), small.data(4, seed=5, shuffle=False)
    options = {"validation_data": validation, "shuffle": False, "verbose": 0}
    adapters.fresh().fit(data, callbacks=[RunCheckpoints(tmp_path, data)], **options)
    model = adapters.fresh()
    again = RunCheckpoints(tmp_path, data, resume=True)
    position = again.restore(model)
    assert position == (1, 0, STEPS)
    found = model.fit(data, epochs=2, initial_epoch=position.epoch, callbacks=[again], **options).history
    assert found["loss"] == whole[0].history["loss"][1:]
    assert found["val_loss"] == whole[0].history["val_loss"][1:]


def test_callback_refuses_another_epoch(adapters, begun):
    data = small.data()
    for options in ({"initial_epoch": 1, "epochs": 2}, {"epochs": 2}):
        model, again = adapters.fresh(), RunCheckpoints(begun, data, resume=True)
        again.restore(model)
        with pytest.raises(InputError, match=r"goes on in epoch 0|was broken off in epoch 0"):
            model.fit(data, callbacks=[again], shuffle=False, verbose=0, **options)


def test_early_stopping_ends_a_run(adapters, tmp_path):
    stopping = keras.callbacks.EarlyStopping("loss", min_delta=100.0, patience=1)
    history = run(adapters.fresh(), tmp_path, epochs=9, callbacks=[stopping])
    assert len(history.epochs) == 2


def test_metrics_on_logits_go_on(tmp_path):
    """Keras makes such metrics when they first see numbers."""

    def made():
        model = small.model()
        small.compile_small(model, "sgd", eager=True, weighted_metrics=["sparse_categorical_accuracy"])
        return model

    options = {"epochs": 1, "validation_data": None}
    expected = run(made(), **options)
    with pytest.raises(KeyboardInterrupt):
        run(made(), tmp_path, callbacks=[At(interrupt, 3)], **options)
    assert run(made(), tmp_path, resume=True, **options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "`epochs` must be a whole number of at least 1; given 0"),
        ({"epochs": True}, "`epochs` must be"),
        ({"data": {"token_ids": 1}}, "`data` must be a TokenDataset; given dict"),
        ({"resume": True}, "`resume=True` needs the `folder`"),
        ({"every_steps": 0, "folder": "run"}, "`every_steps` must be above 0, or None; given 0"),
        ({"every_minutes": -1, "folder": "run"}, "`every_minutes` must be above 0"),
    ],
)
def test_bad_arguments_are_refused(adapters, options, message):
    with pytest.raises(InputError, match=message):
        run(adapters.fresh(), **options)


def test_model_that_is_not_compiled_is_refused(adapters):
    with pytest.raises(InputError, match="is not compiled"):
        run(Gemma2CausalLM(adapters.model.backbone, compile=False))
