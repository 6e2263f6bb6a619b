"""The container of GGUF files, whatever model is in it: keys with values, and tensors, read as data and doubted.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import ml_dtypes
import numpy as np

from gemma2_keras.checkpoints.guard import shown
from gemma2_keras.errors import CheckpointError

MAGIC = b"GGUF"
# How numbers lie in a file, by the names that we give to dtypes.
NUMPY_DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Version 3 added files of the other byte order, which are not read; in this one 2 and 3 are the same.
_VERSIONS = (2, 3)
# Far above any honest file: Gemma 2's have some 50 keys, 500 tensors and 256,000 pieces, in 10 MB.
_LARGEST_HEADER = 64 * 2**20
_MOST_KEYS, _MOST_TENSORS, _MOST_STRINGS = 2**14, 2**14, 2**20
_LARGEST_KEY, _LARGEST_NAME, _MOST_DIMENSIONS = 65_535, 64, 4
# What the format calls the types of tensors that are read, by their numbers.
_TENSOR_TYPES = {0: "F32", 1: "F16", 30: "BF16"}
_DTYPES = {"F32": NUMPY_DTYPES["float32"], "F16": NUMPY_DTYPES["float16"], "BF16": NUMPY_DTYPES["bfloat16"]}
# Types of values: of one number each, then the others.
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9


class Tensor(NamedTuple):
    """One tensor of a file.

    Attributes:
        shape: of a matrix (out, in).
        values: a view of the file, float32, float16 or bfloat16.
    """

    shape: tuple[int, ...]
    values: np.ndarray


class Container(NamedTuple):
    """A file, taken apart.

    Attributes:
        keys: numbers as NumPy scalars, which tell their type; strings; arrays of numbers as NumPy arrays, of strings as
            lists.
        tensors: by name, in the order of the file.
    """

    keys: dict[str, Any]
    tensors: dict[str, Tensor]


def read_container(path: str | os.PathLike) -> Container:
    """Take a GGUF file apart; its tensors stay on disk until they are looked at.

    Raises:
        CheckpointError: if there is no such file, it is truncated or broken in any way, holds types of tensors that are
            not read, or is one of several parts.
    """
    path = Path(path)
    header = _Header(path, _map(path))
    tensor_count, key_count = header.start()
    keys = {}
    for _ in range(key_count):
        key = header.text("a key", _LARGEST_KEY)
        if key in keys:
            raise header.error(f"key {shown(key)} stands twice")
        keys[key] = header.value(key)
    if keys.get("split.count", 1) != 1:
        raise CheckpointError(f"{path} is one of several parts: join them with `llama-gguf-split --merge`.")
    alignment = keys.get("general.alignment", np.uint32(32))
    if not isinstance(alignment, np.integer) or not 1 <= alignment <= 2**20 or int(alignment).bit_count() != 1:
        raise header.error("`general.alignment` is no power of two")
    described = {}
    for _ in range(tensor_count):
        name = header.text("the name of a tensor", _LARGEST_NAME)
        if name in described:
            raise header.error(f"tensor {shown(name)} stands twice")
        described[name] = header.tensor(name)
    return Container(keys, _place(header, described, int(alignment)))


def _map(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            if not path.is_file():
                raise OSError("no regular file")
            size = os.fstat(file.fileno()).st_size
            # Nothing can be mapped of an empty file.
            return np.memmap(file, np.uint8, "c").view(np.ndarray) if size else np.zeros(0, np.uint8)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a GGUF file: {error}") from error


class _Header:
    """Reads what stands before the tensors, from the beginning on, and never past what is there."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.place = path, data, 0
        self._readable = data[:_LARGEST_HEADER].data

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is truncated or broken ({what}). Copy or download the file again.")

    def _take(self, size: int) -> memoryview:
        if size > len(self._readable) - self.place:
            if self.place + size > len(self.data):
                raise self.error("it ends too early")
            raise self.error(f"its header is larger than {_LARGEST_HEADER >> 20} MiB")
        self.place += size
        return self._readable[self.place - size : self.place]

    def _whole(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def start(self) -> tuple[int, int]:
        """How many tensors and keys follow."""
        if bytes(self._readable[:4]) != MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF file.")
        self._take(4)
        version = self._whole(4)
        if version not in _VERSIONS:
            swapped = struct.unpack("<I", struct.pack(">I", version))[0] in _VERSIONS
            given = "of big-endian byte order" if swapped else f"of version {version}"
            raise CheckpointError(
                f"{self.path} is a GGUF file {given}; little-endian ones of version 2 and 3 are read."
            )
        tensors, keys = self._whole(8), self._whole(8)
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise self.error(f"it claims {tensors} tensors and {keys} keys")
        return tensors, keys

    def text(self, what: str, most: int | None = None) -> str:
        size = self._whole(8)
        if most is not None and not 1 <= size <= most:
            raise self.error(f"{what} is {size} bytes long")
        try:
            return str(self._take(size), "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is no UTF-8") from error

    def value(self, key: str) -> Any:
        type_ = self._whole(4)
        if type_ == _STRING:
            return self.text(f"the value of {shown(key)}")
        if type_ != _ARRAY:
            return self._numbers(key, type_, 1)[0]
        type_, count = self._whole(4), self._whole(8)
        if type_ == _STRING:
            if count > _MOST_STRINGS:
                raise self.error(f"key {shown(key)} claims {count} strings")
            return [self.text(f"an element of {shown(key)}") for _ in range(count)]
        return self._numbers(key, type_, count)

    def _numbers(self, key: str, type_: int, count: int) -> np.ndarray:
        if type_ not in _NUMBERS:
            what = "arrays within an array" if type_ == _ARRAY else f"a value of the unknown type {type_}"
            raise self.error(f"key {shown(key)} has {what}")
        dtype = np.dtype(_NUMBERS[type_])
        numbers = np.frombuffer(self._take(count * dtype.itemsize), dtype)
        if type_ == _BOOL and (numbers.view(np.uint8) > 1).any():
            raise self.error(f"key {shown(key)} is neither true nor false")
        return numbers

    def tensor(self, name: str) -> tuple[str, tuple[int, ...], int]:
        """Type, shape and place of the tensor whose name was read."""
        dimensions = self._whole(4)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise self.error(f"tensor {shown(name)} has {dimensions} dimensions")
        # The fastest first, the other way round than elsewhere.
        shape = tuple(self._whole(8) for _ in range(dimensions))[::-1]
        type_, offset = self._whole(4), self._whole(8)
        if type_ not in _TENSOR_TYPES:
            raise CheckpointError(
                f"{self.path} has tensor {shown(name)} in type {_type_name(type_)}; read are "
                f"{', '.join(_TENSOR_TYPES.values())}. Quantised weights cannot be made whole again: convert the "
                "original checkpoint, or take a file in bf16, f16 or f32."
            )
        return _TENSOR_TYPES[type_], shape, offset


def _type_name(type_: int) -> str:
    try:
        return gguf.GGMLQuantizationType(type_).name
    except ValueError:
        return f"{type_}, which is unknown"


def _place(
    header: _Header, described: dict[str, tuple[str, tuple[int, ...], int]], alignment: int
) -> dict[str, Tensor]:
    """The tensors where they lie: one behind the other, in the order of their names, as llama.cpp asks, too."""
    start = _aligned(header.place, alignment)
    tensors, end = {}, 0
    for name, (type_, shape, offset) in described.items():
        dtype = _DTYPES[type_]
        size = math.prod(shape) * dtype.itemsize
        if offset != end:
            raise header.error(f"tensor {shown(name)} does not lie behind the one before it")
        if not size or start + offset + size > len(header.data):
            raise header.error(f"tensor {shown(name)} of shape {shape} does not lie inside the file")
        values = header.data[start + offset : start + offset + size].view(dtype).reshape(shape)
        tensors[name] = Tensor(shape, values)
        end = _aligned(offset + size, alignment)
    return tensors


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC
