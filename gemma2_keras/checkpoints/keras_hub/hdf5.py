"""HDF5 files from outside, read as data, without the HDF5 library.

That library is a large C program that trusts the files it opens, so foreign bytes do not reach it. What Keras writes
is a small part of the format, the same since HDF5 1.6: groups with symbol tables, and arrays in one piece without
filters. This module reads that part and refuses all else by name, above all what reaches out of the file or makes much
out of little: links that are no plain ones, external and virtual arrays, compression. Nothing here allocates or loops
by a number that the file claims and does not have the bytes for.

Source: HDF5 File Format Specification (https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html), versions
0 of the superblock and 1 of object headers.
"""

from __future__ import annotations

import math
import os
import re
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from gemma2_keras.errors import CheckpointError

# Far above what an honest file has: that of a model of 46 layers has 2,000 groups and arrays, described by 1 MiB.
MOST_METADATA, _MOST_MEMBERS = 8 * 2**20, 20_000
# Each read counts for at least so many bytes, so that many small ones have an end as well.
_LEAST_READ = 64
_LONGEST_PATH, _MOST_DIMENSIONS = 255, 8

_PLAIN_NAME = re.compile(rb"[ -.0-~]+")  # printable, and no slash
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_UNDEFINED = 2**64 - 1
_SOFT_LINK = 2
_GROUP_NODE, _HIGHEST_NODE = 0, 8
_TEXT_OF_ANY_LENGTH = 0x19

# Types of messages in the header of an object.
_NIL, _DATASPACE, _DATATYPE, _LAYOUT, _ATTRIBUTE, _CONTINUATION, _SYMBOL_TABLE = 0x0, 0x1, 0x3, 0x8, 0xC, 0x10, 0x11
_LINK_INFO, _LINK = 0x2, 0x6
_READ = {_DATASPACE, _DATATYPE, _LAYOUT, _ATTRIBUTE, _SYMBOL_TABLE, _LINK_INFO, _LINK}
_LINKS = {1: "soft links", 64: "external links"}
# Group information, fill values of two versions, a comment, and times of two versions.
_HARMLESS = {_NIL, 0xA, 0x4, 0x5, 0xD, 0xE, 0x12}
_REFUSED = {
    0x7: "arrays in other files (external storage)",
    0xB: "compressed or otherwise filtered arrays",
    0xF: "data types shared between arrays",
    0x15: "attributes of a later format",
}
_LAYOUTS = {0: "compact", 2: "chunked", 3: "virtual"}
_CONTIGUOUS = 1
# The datatype messages of the floating-point numbers that weights may be.
_FLOATS = {
    bytes.fromhex("11201f000400000000002000170800177f000000"): "float32",
    bytes.fromhex("11200f0002000000000010000a05000a0f000000"): "float16",
}
_OPAQUE = 5
_CLASSES = (
    "whole numbers",
    "numbers that are neither float32 nor float16 nor bfloat16",
    "times",
    "texts",
    "bit fields",
    "opaque values without the attribute dtype=bfloat16",
    "records",
    "references",
    "enumerations",
    "texts or sequences of any length",
    "arrays of arrays",
)


class StoredArray(NamedTuple):
    """Where an array lies in its file.

    Attributes:
        offset: of its first byte.
        shape: its dimensions, row by row.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`, in little-endian order.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * _numpy_dtype(self.dtype).itemsize


class Hdf5File:
    """The arrays of a file that Keras wrote with h5py, found and checked without reading them.

    Args:
        path: the file.

    Attributes:
        path: the file.
        arrays: each array by its path in the file, such as `"layers/rms_normalization/vars/0"`.

    Raises:
        CheckpointError: if the file is missing, truncated or broken, or holds what Keras does not write.

    Example:

    >>> import tempfile
    >>> import h5py
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "model.weights.h5")
    ...     with h5py.File(path, "w") as file:
    ...         file["layers/dense/vars/0"] = np.ones((2, 3), "float32")
    ...     Hdf5File(path).arrays
    {'layers/dense/vars/0': StoredArray(offset=2048, shape=(2, 3), dtype='float32')}
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no regular file.")
        try:
            with open(path, "rb") as file:
                self.arrays = _Walk(path, file).arrays()
                # Kept open: another file that takes its place is none of ours.
                self._descriptor = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._descriptor)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path.parent} lacks the file {path.name}.") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        _check_apart(path, self.arrays)

    def read(self, name: str) -> np.ndarray:
        """One array. Keras writes such files in place, so what is read must not change with them.

        Raises:
            CheckpointError: if the file has become shorter since it was checked.
        """
        array = self.arrays[name]
        try:
            with os.fdopen(os.dup(self._descriptor), "rb") as file:
                file.seek(array.offset)
                raw = np.fromfile(file, np.uint8, array.nbytes)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} has changed while it was read ({error}).") from error
        if len(raw) != array.nbytes:
            raise CheckpointError(f"{self.path} has changed while it was read (it has become shorter).")
        return raw.view(_numpy_dtype(array.dtype)).reshape(array.shape)


def _numpy_dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name).newbyteorder("<")


def _check_apart(path: Path, arrays: dict[str, StoredArray]) -> None:
    end, before = 0, ""
    for name, array in sorted(arrays.items(), key=lambda entry: entry[1].offset):
        if array.offset < end:
            raise CheckpointError(f"{path} is broken: {before!r} and {name!r} overlap.")
        end, before = array.offset + array.nbytes, name


class _Walk:
    """One pass over the groups of a file, every structure of which is read at most once."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = file.seek(0, 2)
        self._left, self._members_left = MOST_METADATA, _MOST_MEMBERS
        self._seen: set[int] = set()
        self._heaps: dict[int, dict[int, bytes]] = {}

    def arrays(self) -> dict[str, StoredArray]:
        """Every array by its path."""
        found: dict[str, StoredArray] = {}
        groups = [("", self._root())]
        while groups:
            prefix, address = groups.pop()
            messages = self._messages(address)
            if _SYMBOL_TABLE in messages:
                tree, heap = self._unpack("<QQ", messages[_SYMBOL_TABLE][0])
                for name, child in self._members(tree, heap):
                    self._members_left -= 1
                    if self._members_left < 0 or len(prefix) + len(name) > _LONGEST_PATH:
                        self._refuse(f"more than {_MOST_MEMBERS} objects, or names of more than {_LONGEST_PATH} bytes")
                    groups.append((f"{prefix}{name}/", child))
            elif prefix:
                name = prefix[:-1]
                if name in found:
                    self._break(f"{name!r} stands twice")
                found[name] = self._array(name, messages)
            else:
                self._break("the root is no group")
        return found

    def _root(self) -> int:
        if self._size < 96 or self._take(0, 8) != _SIGNATURE:
            raise CheckpointError(f"{self._path} is no HDF5 file, or truncated. Copy or download the file again.")
        version, *_, offsets, lengths = self._take(8, 7)
        if version:
            self._refuse(f"a superblock of version {version}")
        base, _, end, driver, _, root, _, _ = struct.unpack("<QQQQQQII", self._take(24, 56))
        if (offsets, lengths) != (8, 8) or base or driver != _UNDEFINED:
            self._refuse("addresses of another size or origin")
        if end > self._size:
            self._break(f"it has {self._size} bytes of {end}")
        return root

    def _messages(self, address: int) -> dict[int, list[bytes]]:
        """The messages in the header of an object, by type."""
        self._once(address)
        start = self._take(address, 16)
        if start[:4] == b"OHDR":
            self._refuse("object headers of a later format")
        version, _, count, _, size = struct.unpack("<BBHII", start[:12])
        if version != 1:
            self._break("no object where one belongs")
        blocks = [(address + 16, size)]
        messages: dict[int, list[bytes]] = {}
        for offset, length in blocks:
            block, at = self._take(offset, length), 0
            while count and at + 8 <= length:
                kind, size, flags = struct.unpack_from("<HHB", block, at)
                body = block[at + 8 : at + 8 + size]
                if len(body) != size:
                    self._break("a message longer than its block")
                at, count = at + 8 + size, count - 1
                if kind == _CONTINUATION:
                    blocks.append(self._unpack("<QQ", body))
                    self._once(blocks[-1][0])
                elif kind == _LINK and self._unpack("<BBB", body)[1] & 8 and body[2] in _LINKS:
                    self._refuse(_LINKS[body[2]])
                elif kind in _REFUSED:
                    self._refuse(_REFUSED[kind])
                elif kind in _READ:
                    if flags & 2:
                        self._refuse("data types shared between arrays")
                    messages.setdefault(kind, []).append(body)
                elif kind not in _HARMLESS:
                    self._refuse(f"messages of type {kind}")
        if _LINK_INFO in messages:
            self._refuse("groups of a later format")
        return messages

    def _members(self, tree: int, heap: int) -> Iterator[tuple[str, int]]:
        """Name and address of each member of a group."""
        self._once(heap)
        signature, length, _, data = struct.unpack("<8sQQQ", self._take(heap, 32))
        if signature != b"HEAP\0\0\0\0":
            self._break("no names where they belong")
        names = self._take(data, length)
        nodes = [(tree, _HIGHEST_NODE)]
        while nodes:
            address, highest = nodes.pop()
            self._once(address)
            signature, kind, level, count = struct.unpack("<4sBBH", self._take(address, 8))
            if signature != b"TREE" or kind != _GROUP_NODE or level > highest:
                self._break("no index of a group where one belongs")
            # Keys and children in turn, a key at both ends.
            children = struct.unpack(f"<{2 * count + 1}Q", self._take(address + 24, 16 * count + 8))[1::2]
            if level:
                nodes += [(child, level - 1) for child in children]
                continue
            for child in children:
                yield from self._leaf(child, names)

    def _leaf(self, address: int, names: bytes) -> Iterator[tuple[str, int]]:
        self._once(address)
        signature, version, _, count = struct.unpack("<4sBBH", self._take(address, 8))
        if signature != b"SNOD" or version != 1:
            self._break("no members of a group where they belong")
        for place, header, cached, _ in struct.iter_unpack("<QQI20s", self._take(address + 8, 40 * count)):
            if cached == _SOFT_LINK:
                self._refuse("soft links")
            name = names[place : max(place, names.find(b"\0", place, place + _LONGEST_PATH + 1))]
            if not _PLAIN_NAME.fullmatch(name):
                self._break("a member of a group without a plain name")
            yield name.decode("ascii"), header

    def _array(self, name: str, messages: dict[int, list[bytes]]) -> StoredArray:
        for kind, what in ((_DATASPACE, "shape"), (_DATATYPE, "data type"), (_LAYOUT, "layout")):
            if len(messages.get(kind, ())) != 1:
                self._break(f"{name!r} has no {what}")
        offset, nbytes = self._place(name, messages[_LAYOUT][0])
        marked = any(self._marks_bfloat16(attribute) for attribute in messages.get(_ATTRIBUTE, ()))
        array = StoredArray(
            offset, self._shape(name, messages[_DATASPACE][0]), self._dtype(name, messages[_DATATYPE][0], marked)
        )
        if array.nbytes != nbytes:
            self._break(f"{name!r} has {nbytes} bytes for the shape {array.shape} of {array.dtype}")
        if not nbytes or offset == _UNDEFINED:
            self._break(f"{name!r} has no data")
        if offset + nbytes > self._size:
            self._break(f"{name!r} ends at {offset + nbytes}, the file at {self._size}")
        return array

    def _place(self, name: str, layout: bytes) -> tuple[int, int]:
        version, kind = self._unpack("<BB", layout)
        if kind != _CONTIGUOUS and version in (3, 4):
            self._refuse(f"arrays of {_LAYOUTS.get(kind, 'unknown')} layout ({name!r})")
        if version != 3:
            self._refuse(f"arrays with a layout of version {version} ({name!r})")
        offset, nbytes = self._unpack("<QQ", layout[2:])
        return offset, nbytes

    def _shape(self, name: str, space: bytes) -> tuple[int, ...]:
        version, rank, _ = self._unpack("<BBB", space)
        if version != 1 or rank > _MOST_DIMENSIONS:
            self._break(f"{name!r} has no shape of at most {_MOST_DIMENSIONS} dimensions")
        return self._unpack(f"<{rank}Q", space[8:])

    def _dtype(self, name: str, datatype: bytes, marked: bool) -> str:
        kind, size = self._unpack("<B3xI", datatype)
        if marked and kind & 15 == _OPAQUE and size == 2:
            return "bfloat16"
        if marked:
            self._break(f"{name!r} says that it is bfloat16 and is not")
        if datatype[:20] in _FLOATS:
            return _FLOATS[datatype[:20]]
        what = _CLASSES[kind & 15] if kind & 15 < len(_CLASSES) else "values of unknown type"
        return self._refuse(f"{what} ({name!r})")

    def _marks_bfloat16(self, attribute: bytes) -> bool:
        """Whether an attribute of an array is Keras' note that its opaque values are bfloat16."""
        version, _, *sizes = self._unpack("<BBHHH", attribute)
        if version != 1:
            self._refuse(f"attributes of version {version}")
        # Name, data type and shape, each padded to whole words, then the value.
        words = [-(-size // 8) * 8 for size in sizes]
        name, datatype, data = attribute[8 : 8 + sizes[0]], attribute[8 + words[0] :], attribute[8 + sum(words) :]
        if name != b"dtype\0":
            return False
        if datatype[:1] == bytes([_TEXT_OF_ANY_LENGTH]):
            length, heap, index = self._unpack("<IQI", data)
            data = self._heap(heap).get(index, b"")[:length]
        return data.rstrip(b"\0") == b"bfloat16"

    def _heap(self, address: int) -> dict[int, bytes]:
        """The values of any length that lie together at one address."""
        if address not in self._heaps:
            signature, size = struct.unpack("<8sQ", self._take(address, 16))
            if signature != b"GCOL\1\0\0\0" or size < 16:
                self._break("no texts where they belong")
            heap, at = self._take(address, size), 16
            values = self._heaps[address] = {}
            while at + 16 <= size:
                index, length = struct.unpack_from("<H6xQ", heap, at)
                if not index:
                    break
                values[index] = heap[at + 16 : at + 16 + length]
                at += 16 + -(-length // 8) * 8
        return self._heaps[address]

    def _once(self, address: int) -> None:
        if address in self._seen:
            self._break("a structure that stands in two places (a cycle or a second link)")
        self._seen.add(address)

    def _take(self, offset: int, length: int) -> bytes:
        self._left -= max(length, _LEAST_READ)
        if offset + length > self._size:
            self._break("an address beyond its end")
        if self._left < 0:
            self._refuse(f"more than {MOST_METADATA} bytes of structure")
        self._file.seek(offset)
        data = self._file.read(length)
        if len(data) != length:
            self._break("it became shorter")
        return data

    def _unpack(self, layout: str, data: bytes) -> tuple:
        if len(data) < struct.calcsize(layout):
            self._break("a message shorter than it must be")
        return struct.unpack_from(layout, data)

    def _break(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self._path} is truncated or broken ({what}). Copy or download the file again.")

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{self._path} holds {what}, which is not implemented: Keras writes no such file. "
            "Load it with the program that wrote it, and save it from KerasHub."
        )
