"""Files of the safetensors format: read as views of the file, and written one tensor at a time."""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from gemma2_keras.checkpoints.guard import parse_json
from gemma2_keras.errors import CheckpointError

# The format's own limit.
LARGEST_HEADER = 100_000_000
# What the format calls the dtypes that weights may have.
DTYPES = {"F32": np.dtype("float32"), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("float16")}
# Bits of an element in the other dtypes that the format knows.
_OTHER_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("I32", "U32"), 32),
    **dict.fromkeys(("I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_BITS = {**{name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}, **_OTHER_BITS}
_METADATA = "__metadata__"
# Where the data of a file that we write begins is a multiple of this, so that arrays can be used where they are.
_ALIGNMENT = 64


class Entry(NamedTuple):
    """Where a tensor lies in a file.

    Attributes:
        dtype: as the format calls it.
        shape: its shape.
        offset: where it begins, in bytes from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int


class TensorFile:
    """A safetensors file whose header holds what it promises; nothing else of it is read until it is asked for.

    Args:
        path: of the file.

    Attributes:
        path: likewise.
        entries: every tensor by its name.

    Raises:
        CheckpointError: if there is no such file, it is truncated or broken, or has a tensor twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.exists() and not path.is_file():
                raise OSError("no regular file")
            with open(path, "rb") as file:
                self.entries = _entries(file, os.fstat(file.fileno()).st_size)
                # One mapping for all tensors, which the system sets up sooner than one for each, and of this very file:
                # another that takes its place is none of ours.
                self._bytes = np.asarray(np.memmap(file, np.uint8, "c"))
                self._descriptor = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._descriptor)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path.parent} lacks the file {path.name}.") from error
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                raise MemoryError(f"There is no room in this process's memory for {path}.") from error
            raise CheckpointError(
                f"{path} is truncated or broken ({error}). Copy or download the file again."
            ) from error

    def require_known(self, name: str) -> np.dtype:
        """The dtype of a tensor.

        Raises:
            CheckpointError: if it is none that weights may have.
        """
        dtype = self.entries[name].dtype
        if dtype not in DTYPES:
            raise CheckpointError(f"Tensor {name!r} has dtype {dtype}; allowed: {', '.join(DTYPES)}.")
        return DTYPES[dtype]

    def read(self, name: str) -> np.ndarray:
        """A tensor, a view of the file unless its place is not aligned; writing to it does not reach the file."""
        dtype, shape, offset = self.require_known(name), self.entries[name].shape, self.entries[name].offset
        if 0 in shape:
            return np.empty(shape, dtype)
        if os.fstat(self._descriptor).st_size < len(self._bytes):
            raise CheckpointError(f"{self.path} has become shorter while it was read. Copy or download it again.")
        raw = self._bytes[offset : offset + math.prod(shape) * dtype.itemsize]
        return np.require(raw.view(dtype).reshape(shape), requirements="A")


def _entries(file: Any, size: int) -> dict[str, Entry]:
    """The header of a file of `size` bytes, as the format demands it."""
    start = file.read(8)
    if len(start) < 8:
        raise ValueError("it ends within the length of its header")
    (length,) = struct.unpack("<Q", start)
    if length > min(size - 8, LARGEST_HEADER):
        raise ValueError(f"its header is said to have {length} bytes, of {size - 8} in the file")
    header = parse_json(file.read(length).decode())
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{_METADATA} is no object of texts")
    begin = 8 + length
    entries, places = {}, []
    for name, value in header.items():
        entry, end = _entry(name, value, begin)
        entries[name] = entry
        places.append((entry.offset, end, name))
    # In the order of the file each tensor begins where the one before ends, and the last one ends the file.
    for offset, end, name in sorted(places):
        if offset != begin:
            raise ValueError(f"{name[:80]!r} begins at byte {offset}, not at {begin} where the one before ends")
        begin = end
    if begin != size:
        raise ValueError(f"its tensors end at byte {begin}, the file at {size}")
    return entries


def _entry(name: str, value: Any, begin: int) -> tuple[Entry, int]:
    """One entry of a header, and where its tensor ends."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name[:80]!r} has not just dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name[:80]!r} has the unknown dtype {str(dtype)[:20]!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"the shape or the offsets of {name[:80]!r} are none")
    if math.prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{name[:80]!r} has {offsets[1] - offsets[0]} bytes, which its shape and dtype have not")
    return Entry(dtype, tuple(shape), begin + offsets[0]), begin + offsets[1]


def _are_sizes(value: Any) -> bool:
    """Whether a value is a short list of numbers that can be sizes in a file."""
    return (
        isinstance(value, list) and len(value) <= 32 and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )


def write_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, read: Callable[[str], np.ndarray]
) -> None:
    """Write tensors of one dtype, each of which is in memory only while it is written.

    Args:
        path: of the file.
        shapes: of each tensor, by its name.
        dtype: of all: `"float32"`, `"bfloat16"` or `"float16"`.
        read: gives a tensor of that shape by its name; it is converted if it has another dtype.
    """
    kind, numbers = next((kind, numbers) for kind, numbers in DTYPES.items() if numbers.name == dtype)
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * numbers.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            value = np.asarray(read(name))
            if value.shape != shape:
                raise ValueError(f"{name!r} has shape {value.shape}, where {shape} was announced.")
            for rows in _pieces(value):
                file.write(np.ascontiguousarray(rows, numbers).view("uint8").data)


def _pieces(value: np.ndarray, most: int = 2**24) -> list[np.ndarray]:
    """The array in pieces of about `most` numbers, so that their conversion needs little memory."""
    return np.array_split(value, max(1, min(len(value), value.size // most))) if value.ndim else [value.reshape(1)]
