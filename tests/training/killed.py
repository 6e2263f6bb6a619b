"""Run in a process of its own: one run as a whole, and one that is killed again and again.

    python -m tests.training.killed FOLDER

writes `whole/` and `killed/` there, each with the run, and the final weights in `weights.npz`. The libraries are loaded
once; each attempt is a fork of this process, and ends by SIGKILL or by finishing.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np
from keras import ops

from gemma2_keras import adamw, fine_tune
from gemma2_keras.checkpoints import saving
from tests.training import small

EPOCHS = 3


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(keras.callbacks.Callback):
    """Kills the process behind one of its own steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.left -= 1
        if self.left == 0:
            kill()


def kill_at_call(owner, name: str, calls: int) -> None:
    """Kill the process in place of one of the calls of a function."""
    original = getattr(owner, name)
    left = [calls]

    def function(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            kill()
        return original(*args, **kwargs)

    setattr(owner, name, function)


def run(folder: Path, callbacks=()) -> None:
    data = small.data()
    optimizer = adamw(data, epochs=EPOCHS, learning_rate=0.05, global_clipnorm=1.0, gradient_accumulation_steps=2)
    model = small.model(optimizer=optimizer, eager=True)
    options = {"validation_data": small.data(4, seed=5, shuffle=False), "every_steps": 2, "verbose": 0}
    fine_tune(model, data, epochs=EPOCHS, folder=folder, resume=True, callbacks=callbacks, **options)
    np.savez(folder / "weights.npz", *[ops.convert_to_numpy(v) for v in model.trainable_variables])


# Behind a step; between the two files of a checkpoint; before a second checkpoint gets its name, in another epoch.
ATTEMPTS = [
    lambda: [KillAt(4)],
    lambda: kill_at_call(saving, "_flush", 2),
    lambda: kill_at_call(Path, "rename", 2),
]


def attempt(folder: Path, prepare) -> int:
    """Run in a fork; returns the signal that ended it, or 0."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            run(folder, prepare() or ())
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("An attempt failed.")
    return os.WTERMSIG(status)


def main(folder: Path) -> None:
    assert attempt(folder / "whole", lambda: ()) == 0
    for prepare in ATTEMPTS:
        assert attempt(folder / "killed", prepare) == signal.SIGKILL
    assert attempt(folder / "killed", lambda: ()) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
