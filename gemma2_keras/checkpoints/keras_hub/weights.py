"""The tensors of a preset folder in KerasHub's format, in HDF5 files: read, and written."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np

from gemma2_keras.checkpoints.contents import Checkpoint, shards_of
from gemma2_keras.checkpoints.guard import path_inside, read_json, shown, some
from gemma2_keras.checkpoints.keras_hub.hdf5 import Hdf5File
from gemma2_keras.checkpoints.keras_hub.settings import CONFIG_FILE, parse_config
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.checkpoints.saving import write_json
from gemma2_keras.errors import CheckpointError

WEIGHTS_FILE = "model.weights.h5"
INDEX_FILE = "model.weights.json"
_SHARD = re.compile(r"model_[0-9]{1,10}\.weights\.h5")
# The files of weights, by their names.
WEIGHTS = re.compile(rf"{re.escape(WEIGHTS_FILE)}|{_SHARD.pattern}")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class KerasHubCheckpoint:
    """The configuration and the tensors of a KerasHub preset folder, whole and as expected before any is read.

    Args:
        folder: holds `config.json` and `model.weights.h5`, or `model.weights.json` and the shards that it names.

    Attributes:
        config: the architecture.

    Raises:
        CheckpointError: if a file is missing, truncated or broken, or a tensor is missing, extra, misshapen or of a
            dtype other than float32, bfloat16 and float16; the message names it.
    """

    mapped = False

    def __init__(self, folder: Path) -> None:
        self.config = parse_config(read_json(path_inside(folder, CONFIG_FILE)))
        self._file_of = _arrays(folder)
        if self.config.num_layers > len(self._file_of):
            raise CheckpointError(
                f"{folder} has {len(self._file_of)} tensors, too few for the {self.config.num_layers} layers of the "
                "configuration."
            )
        self._weights = weight_map(self.config)
        expected = {_path(weight.keras_hub): name for name, weight in self._weights.items()}
        missing, extra = expected.keys() - self._file_of.keys(), self._file_of.keys() - expected.keys()
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} tensors: {some(missing)}.")
        if extra:
            raise CheckpointError(f"{folder} has {len(extra)} tensors that no Gemma 2 has: {some(extra)}.")
        for path, name in expected.items():
            found = self._file_of[path].arrays[path].shape
            asked = _stored_shape(name, self._weights[name].shape, self.config.head_dim)
            if found != asked:
                raise CheckpointError(f"Tensor {path!r} has shape {found}; the configuration asks {asked}.")

    @property
    def dtype(self) -> str:
        """The dtype of the tensors; float32 where they differ."""
        dtypes = {file.arrays[path].dtype for path, file in self._file_of.items()}
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    def read(self, name: str) -> np.ndarray:
        """One tensor by its name in transformers' format, (out, in); where it can it is a view of the file.

        Raises:
            CheckpointError: if the file has become shorter since it was checked.
        """
        path = _path(self._weights[name].keras_hub)
        return _from_stored(name, self._file_of[path].read(path), self._weights[name].shape)


def _path(group: str) -> str:
    return f"{group}/vars/0"


def _arrays(folder: Path) -> dict[str, Hdf5File]:
    """Where each array is, the files checked against the index if there is one."""
    single, index_path = path_inside(folder, WEIGHTS_FILE), path_inside(folder, INDEX_FILE)
    if single.exists():
        file = Hdf5File(single)
        return dict.fromkeys(file.arrays, file)
    if not index_path.exists():
        raise CheckpointError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}: there are no weights to load.")
    index = read_json(index_path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{folder / INDEX_FILE} has no `weight_map`.")
    promised: dict[Path, set[str]] = {}
    for group, shard in index.items():
        if not (isinstance(shard, str) and _SHARD.fullmatch(shard)):
            raise CheckpointError(
                f"{folder / INDEX_FILE} names {shown(shard)} as a file of weights; only model_*.weights.h5 are read."
            )
        promised.setdefault(path_inside(folder, shard), set()).add(f"{group.removeprefix('/')}/0")
    file_of: dict[str, Hdf5File] = {}
    for path, names in promised.items():
        file = Hdf5File(path)
        if file.arrays.keys() != names:
            differing = some(file.arrays.keys() ^ names)
            raise CheckpointError(f"{path} does not hold what the index says: {differing} in one of them only.")
        file_of |= dict.fromkeys(file.arrays, file)
    return file_of


# The last part of a tensor's name says how KerasHub keeps it: projections to heads as (head, in, size), that from
# heads as (head, size, out), other matrices as (in, out), and all else as we do.
_TO_HEADS, _FROM_HEADS = {"q_proj", "k_proj", "v_proj"}, {"o_proj"}
_TURNED = {"gate_proj", "up_proj", "down_proj"}


def _kind(name: str) -> str:
    return name.split(".")[-2]


def _stored_shape(name: str, shape: tuple[int, ...], head_dim: int) -> tuple[int, ...]:
    if _kind(name) in _TO_HEADS:
        return (shape[0] // head_dim, shape[1], head_dim)
    if _kind(name) in _FROM_HEADS:
        return (shape[1] // head_dim, head_dim, shape[0])
    return shape[::-1] if _kind(name) in _TURNED else shape


def _from_stored(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if _kind(name) in _TO_HEADS:
        return value.transpose(0, 2, 1).reshape(shape)
    if _kind(name) in _FROM_HEADS:
        return value.reshape(-1, shape[0]).T
    return value.T if _kind(name) in _TURNED else value


def _to_stored(name: str, value: np.ndarray, head_dim: int) -> np.ndarray:
    if _kind(name) in _TO_HEADS:
        return value.reshape(-1, head_dim, value.shape[1]).transpose(0, 2, 1)
    if _kind(name) in _FROM_HEADS:
        return value.T.reshape(-1, head_dim, value.shape[0])
    return value.T if _kind(name) in _TURNED else value


def write_weights(folder: Path, checkpoint: Checkpoint, max_shard_size: float | None) -> None:
    """Write all tensors, into several files and an index if they are more than `max_shard_size` GB."""
    weights, shards = weight_map(checkpoint.config), shards_of(checkpoint, max_shard_size)
    files = [WEIGHTS_FILE] if len(shards) == 1 else [f"model_{i:05d}.weights.h5" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        # Bounds on the format, lest another default of the library's be one that nobody has read.
        with h5py.File(folder / file, "w", libver=("earliest", "latest")) as opened:
            if file == files[0]:
                # Older versions of Keras look for the model's own variables, of which there are none.
                opened.create_group("vars").attrs["name"] = "gemma_backbone"
            for name in names:
                value = _to_stored(name, checkpoint.read(name), checkpoint.config.head_dim)
                group = opened.create_group(f"{weights[name].keras_hub}/vars")
                if value.dtype == _BFLOAT16:
                    # HDF5 has no such number: Keras keeps it as two bytes with a note.
                    group.create_dataset("0", data=np.ascontiguousarray(value).view("V2")).attrs["dtype"] = "bfloat16"
                else:
                    group.create_dataset("0", data=value)
    if len(files) > 1:
        shard_of = {
            f"/{weights[name].keras_hub}/vars": file
            for file, names in zip(files, shards, strict=True)
            for name in names
        }
        total = checkpoint.config.parameter_count * np.dtype(checkpoint.dtype).itemsize
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": shard_of})
