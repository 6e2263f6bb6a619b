"""The folder of a training run: its checkpoints, two generations of them, each whole or absent.

A checkpoint is a folder `checkpoint-00000120`, named by the steps made, with the tensors as safetensors and all else as
JSON, and a hash of each. It is written beside, flushed and renamed, so that a process may be killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gemma2_keras.checkpoints.guard import read_json
from gemma2_keras.checkpoints.saving import lock, replacing_folder, write_json
from gemma2_keras.errors import CheckpointError, InputError, warn

FORMAT = 1
HISTORY_FILE = "history.jsonl"
_FACTS_FILE = "state.json"
_TENSORS_FILE = "state.safetensors"
_NAME = re.compile(r"checkpoint-(\d{8,})")
_LOCK_FILE = ".lock"
_GENERATIONS = 2
# The runs that this process goes on with, and their open locks.
_HELD: dict[Path, int] = {}


class Position(NamedTuple):
    """How far a run has come.

    Attributes:
        epoch: the epoch it is in, counted from 0.
        batch: steps made in that epoch.
        step: steps made in all.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0


class RunState(NamedTuple):
    """What one checkpoint holds.

    Attributes:
        position: how far the run had come.
        identity: what the run is of, as plain values: model, optimizer, data.
        tensors: by name.
        results: what Keras showed last, while the epoch is not closed.
    """

    position: Position
    identity: dict[str, Any]
    tensors: dict[str, np.ndarray]
    results: dict[str, float]


class RunFolder:
    """The checkpoints of one run.

    Args:
        path: of the folder, which need not exist.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise TypeError(f"The folder of a run must be a path; given {path!r}.")
        self.path = Path(os.path.abspath(path))
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{self.path} is no folder: choose another one for the run.")

    @property
    def history_file(self) -> Path:
        """Where the run's history is."""
        return self.path / HISTORY_FILE

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of checkpoints, the newest first."""
        found = self.path.iterdir() if self.path.is_dir() else ()
        named = {path: path.is_dir() and _NAME.fullmatch(path.name) for path in found}
        return sorted((path for path, name in named.items() if name), key=lambda p: int(p.name[11:]), reverse=True)

    def refuse_a_run(self) -> None:
        """See to it that no run is here.

        Raises:
            FileExistsError: if there is one.
        """
        if self.checkpoints or self.history_file.exists():
            raise FileExistsError(
                f"{self.path} holds a run already: go on with it by `resume=True`, or choose another folder."
            )

    def hold(self) -> None:
        """Keep other processes out of the run, until `let_go` or the end of this one.

        Raises:
            FileExistsError: if another process trains it.
            OSError: if the folder cannot be written to.
        """
        if self.path in _HELD:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        if lock(descriptor, wait=False) is False:
            os.close(descriptor)
            raise FileExistsError(
                f"Another process is training the run in {self.path}: wait until it ends, or choose another folder."
            )
        _HELD[self.path] = descriptor

    def let_go(self) -> None:
        """Let other processes go on with the run."""
        descriptor = _HELD.pop(self.path, None)
        if descriptor is not None:
            os.close(descriptor)

    def read(self, identity: dict[str, Any]) -> RunState | None:
        """The newest checkpoint that is whole; those that are not are removed, with a warning, once it is read.

        Args:
            identity: what the run must be of.

        Returns:
            `None` if there is no run.

        Raises:
            CheckpointError: if there is a run, and no checkpoint of it can be read.
            InputError: if the run is of something else. Nothing is changed then.
        """
        damaged: dict[Path, CheckpointError] = {}
        for path in self.checkpoints:
            try:
                state = _read(path)
                break
            except CheckpointError as error:
                damaged[path] = error
        else:
            if damaged:
                raise CheckpointError(f"No checkpoint of the run can be read. {' '.join(map(str, damaged.values()))}")
            if self.history_file.exists():
                raise CheckpointError(f"{self.path} has the history of a run and no checkpoint to go on from.")
            return None
        _check_identity(self.path, state.identity, _plain(identity))
        for path, error in damaged.items():
            warn(f"{error} The checkpoint before it is used, of step {state.position.step}.")
            shutil.rmtree(path)
        return state

    def clean(self) -> None:
        """Remove what a process that was killed left half written."""
        for path in self.path.glob(".checkpoint-*"):
            shutil.rmtree(path)

    def write(self, state: RunState) -> None:
        """Add a checkpoint, then remove those before the last one.

        Raises:
            OSError: if it cannot be written; the earlier ones are then as they were.
        """
        before = self.checkpoints
        path = self.path / f"checkpoint-{state.position.step:08d}"
        facts = {
            "format": FORMAT,
            "position": state.position._asdict(),
            "identity": _plain(state.identity),
            # As text: exact, and open to what is no number.
            "results": {name: float(value).hex() for name, value in state.results.items()},
        }
        with replacing_folder(path, _FACTS_FILE, lambda _: True, "checkpoint") as beside:
            try:
                save_file(state.tensors, beside / _TENSORS_FILE)
            except SafetensorError as error:
                # As when the disk is full.
                raise OSError(str(error)) from error
            hashes = {"facts": _hash_of_facts(facts), "tensors": _hash_of_file(beside / _TENSORS_FILE)}
            write_json(beside / _FACTS_FILE, {**facts, "sha256": hashes})
        for old in [other for other in before if other != path][_GENERATIONS - 1 :]:
            shutil.rmtree(old)


def _read(path: Path) -> RunState:
    """A checkpoint, if it is whole."""
    facts = read_json(path / _FACTS_FILE)
    hashes = facts.pop("sha256", None)
    if facts.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"{path} has format {facts['format']!r}; only {FORMAT} is read here.")
    if not isinstance(hashes, dict) or hashes.get("facts") != _hash_of_facts(facts):
        raise CheckpointError(f"{path / _FACTS_FILE} is damaged: its hash is another.")
    try:
        if hashes.get("tensors") != _hash_of_file(path / _TENSORS_FILE):
            raise CheckpointError(f"{path / _TENSORS_FILE} is damaged: its hash is another.")
        tensors = load_file(path / _TENSORS_FILE)
    except OSError as error:
        raise CheckpointError(f"{path / _TENSORS_FILE} cannot be read: {error}") from error
    results = {name: float.fromhex(value) for name, value in facts["results"].items()}
    return RunState(Position(**facts["position"]), facts["identity"], tensors, results)


def _hash_of_facts(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _hash_of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """What a JSON file gives back for a value."""
    return json.loads(json.dumps(value, default=lambda other: type(other).__name__))


def _check_identity(path: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    """Compare what a run is of with what it shall be of."""
    ours, theirs = _flat(asked), _flat(found)
    differ = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
    if not differ:
        return
    parts = [part.replace("_", " ") for part in asked if any(name.partition(".")[0] == part for name in differ)]
    # What both have tells most.
    name = min(differ & ours.keys() & theirs.keys() or differ)
    raise InputError(
        f"The run in {path} is of something else: its {', '.join(parts)} differ ({name!r} was {theirs.get(name)!r} and "
        f"is {ours.get(name)!r}). Give what it was begun with, or another folder. Nothing was changed."
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries, by their paths."""
    if not isinstance(value, dict):
        return {name: value}
    joined = [_flat(part, f"{name}.{key}" if name else key) for key, part in value.items()]
    return {key: leaf for part in joined for key, leaf in part.items()}
