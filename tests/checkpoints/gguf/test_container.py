from __future__ import annotations

import os
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2_keras.checkpoints.gguf.container import read_container
from gemma2_keras.checkpoints.gguf.reading import GgufCheckpoint
from gemma2_keras.checkpoints.gguf.writing import write_gguf
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.errors import CheckpointError
from tests.checkpoints.gguf import raw
from tests.preprocessing import tiny

pytestmark = pytest.mark.once
ARCHITECTURE = ("general.architecture", raw.STRING, "gemma2")


@pytest.fixture
def refused(tmp_path):
    """Asserts that a file is refused with a message, within little memory."""

    def check(content: bytes, message: str) -> None:
        path = tmp_path / "broken.gguf"
        path.write_bytes(content)
        tracemalloc.start()
        try:
            with pytest.raises(CheckpointError, match=message) as caught:
                read_container(path)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()
        assert len(str(caught.value)) < 500 + len(str(path))

    return check


def read(tmp_path, content: bytes):
    (tmp_path / "x.gguf").write_bytes(content)
    return read_container(tmp_path / "x.gguf")


def test_every_type_of_value_is_read(tmp_path):
    values: list[tuple[str, int, Any]] = [
        ("u8", raw.U8, 255),
        ("i8", raw.I8, -128),
        ("u16", raw.U16, 65535),
        ("i16", raw.I16, -32768),
        ("u32", raw.U32, 2**32 - 1),
        ("i32", raw.I32, -(2**31)),
        ("f32", raw.F32, 0.1),
        ("bool", raw.BOOL, True),
        ("string", raw.STRING, "é\0日本"),
        ("u64", raw.U64, 2**64 - 1),
        ("i64", raw.I64, -(2**63)),
        ("f64", raw.F64, 0.1),
        ("strings", raw.ARRAY, (raw.STRING, ["", "a", "é"])),
        ("floats", raw.ARRAY, (raw.F32, [0.5, -0.0])),
        ("bools", raw.ARRAY, (raw.BOOL, [True, False])),
        ("none", raw.ARRAY, (raw.I64, [])),
    ]
    keys = read(tmp_path, raw.whole(values, [])).keys
    expected = {key: value[1] if kind == raw.ARRAY else value for key, kind, value in values}
    expected["f32"] = np.float32(0.1)
    assert list(keys) == list(expected)
    for key, value in expected.items():
        assert keys[key] == value if not isinstance(keys[key], np.ndarray) else keys[key].tolist() == value
    assert keys["f32"].dtype == np.float32
    assert keys["u8"].dtype == np.uint8


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 256])
def test_tensors_lie_where_the_file_says(tmp_path, version, alignment):
    tensors = [raw.tensor("a", (3, 5)), raw.tensor("b", (7,), raw.TYPE_F16), raw.tensor("c", (2, 1), raw.TYPE_BF16)]
    for i, entry in enumerate(tensors):
        entry["data"] = bytes(range(i, i + len(entry["data"])))
    keys = [("general.alignment", raw.U32, alignment)]
    found = read(tmp_path, raw.whole(keys, tensors, version=version, alignment=alignment)).tensors
    assert [(name, t.values.dtype.name, t.shape) for name, t in found.items()] == [
        ("a", "float32", (3, 5)),
        ("b", "float16", (7,)),
        ("c", "bfloat16", (2, 1)),
    ]
    assert [t.values.tobytes() for t in found.values()] == [entry["data"] for entry in tensors]


@pytest.mark.parametrize(
    "content", [b"", b"GGU", b"GGML" + bytes(100), b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_what_is_no_gguf_file(refused, content):
    refused(content, r"broken.gguf is no GGUF file\.")


@pytest.mark.parametrize(
    ("version", "message"),
    [(0, "of version 0"), (1, "of version 1"), (4, "of version 4"), (3 << 24, "of big-endian byte order")],
)
def test_versions_that_are_not_read(refused, version, message):
    refused(raw.whole([], [], version=version), f"is a GGUF file {message}; little-endian ones of version 2 and 3")


def test_a_file_that_ends_at_any_place_before_its_end(tmp_path):
    content = raw.whole(raw.smallest_keys(), raw.smallest_tensors())
    # The last tensor is followed by padding, which may be missing.
    last = len(content) - (-len(raw.smallest_tensors()[-1]["data"]) % 32)
    for length in [*range(0, last, 5), last - 1]:
        with pytest.raises(CheckpointError, match=r"is truncated or broken \(.+\)\. Copy or download|is no GGUF file"):
            read(tmp_path, content[:length])
    assert len(read(tmp_path, content[:last]).tensors) == 13


def with_tensor(**changes: Any) -> bytes:
    return raw.whole([ARCHITECTURE], [{**raw.tensor("a", (2, 3)), **changes}])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (raw.whole([ARCHITECTURE, ARCHITECTURE], []), r"\(key 'general.architecture' stands twice\)"),
        (raw.whole([("", raw.U8, 1)], []), "a key is 0 bytes long"),
        (raw.whole([("k" * 70_000, raw.U8, 1)], []), "a key is 70000 bytes long"),
        (raw.whole([(b"\xff", raw.U8, 1)], []), "a key is no UTF-8"),
        (raw.whole([("k", raw.STRING, b"\xed\xa0\x80")], []), "the value of 'k' is no UTF-8"),
        (raw.whole([("k" * 999, 13, b"\0" * 8)], []), "key 'k+… has a value of the unknown type 13"),
        (raw.whole([("k", 2**31, b"")], []), "has a value of the unknown type 2147483648"),
        (raw.whole([("k", raw.BOOL, 1)], []).replace(b"\x07\0\0\0\x01", b"\x07\0\0\0\x02"), "neither true nor false"),
        (raw.whole([("k", raw.ARRAY, (raw.ARRAY, []))], []), "key 'k' has arrays within an array"),
        (raw.whole([("k", raw.ARRAY, (99, []))], []), "key 'k' has a value of the unknown type 99"),
        (raw.whole([("k", raw.ARRAY, (raw.STRING, ["a", b"\x80"]))], []), "an element of 'k' is no UTF-8"),
        (raw.whole([], [], key_count=2**60), "it claims 0 tensors and 1152921504606846976 keys"),
        (raw.whole([], [], tensor_count=20_000), "it claims 20000 tensors and 0 keys"),
        (raw.whole([], [], key_count=1)[:24], "it ends too early"),
        (raw.whole([("general.alignment", raw.U32, 0)], []), "`general.alignment` is no power of two"),
        (raw.whole([("general.alignment", raw.U32, 48)], []), "`general.alignment` is no power of two"),
        (raw.whole([("general.alignment", raw.F32, 32.0)], []), "`general.alignment` is no power of two"),
        (raw.whole([("general.alignment", raw.ARRAY, (raw.U32, [32]))], []), "`general.alignment` is no power of two"),
        (raw.whole([], [raw.tensor("a", (1,)), raw.tensor("a", (1,))]), "tensor 'a' stands twice"),
        (raw.whole([], [raw.tensor("", (1,))]), "the name of a tensor is 0 bytes long"),
        (raw.whole([], [raw.tensor("n" * 65, (1,))]), "the name of a tensor is 65 bytes long"),
        (with_tensor(dimensions=0), "tensor 'a' has 0 dimensions"),
        (with_tensor(dimensions=5), "tensor 'a' has 5 dimensions"),
        (with_tensor(dimensions=2**32 - 1), "tensor 'a' has 4294967295 dimensions"),
        (with_tensor(shape=(0, 3)), r"tensor 'a' of shape \(0, 3\) does not lie inside the file"),
        (with_tensor(shape=(2, 9)), r"tensor 'a' of shape \(2, 9\) does not lie inside the file"),
        (with_tensor(shape=(2**63, 2**63)), "does not lie inside the file"),
        (with_tensor(shape=(2**32, 2**32, 1)), "does not lie inside the file"),
        (with_tensor(offset=32), "tensor 'a' does not lie behind the one before it"),
        (with_tensor(offset=2**64 - 32), "tensor 'a' does not lie behind the one before it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_way_to_be_broken(refused, content, message):
    refused(content, message)


@pytest.mark.parametrize("offset", [0, 32, 63, 65, 96])
def test_tensors_that_overlap_or_leave_holes(refused, offset):
    tensors = [raw.tensor("a", (10,)), {**raw.tensor("b", (10,)), "offset": offset}]
    refused(raw.whole([], tensors), "tensor 'b' does not lie behind the one before it")


@pytest.mark.parametrize(
    ("type_", "name"), [(2, "Q4_0"), (8, "Q8_0"), (12, "Q4_K"), (28, "F64"), (99, "99, which is unknown")]
)
def test_types_of_tensors_that_are_not_read(refused, type_, name):
    refused(
        with_tensor(type=type_), f"has tensor 'a' in type {name}; read are F32, F16, BF16. Quantised weights cannot"
    )


@pytest.mark.parametrize("count", [2**20 + 1, 2**40, 2**64 - 1])
@pytest.mark.parametrize("kind", [raw.STRING, raw.F32, raw.U64])
def test_arrays_that_claim_more_than_there_is(refused, kind, count):
    key = raw.text("k") + struct.pack("<IIQ", raw.ARRAY, kind, count)
    content = raw.whole([], [], key_count=1)[:24] + key + bytes(1000)
    refused(content, "it ends too early" if kind != raw.STRING else "key 'k' claims [0-9]+ strings")


@pytest.mark.parametrize("length", [2000, 2**40, 2**64 - 1])
def test_a_string_that_claims_more_than_there_is(refused, length):
    key = raw.text("k") + struct.pack("<IQ", raw.STRING, length)
    refused(raw.whole([], [], key_count=1)[:24] + key + bytes(1000), "it ends too early")


def test_a_header_larger_than_any_honest_one(tmp_path):
    path = tmp_path / "x.gguf"
    key = raw.text("k") + struct.pack("<IQ", raw.STRING, 2**27)
    path.write_bytes(raw.whole([], [], key_count=1)[:24] + key)
    # Zeros that take no place on disk.
    os.truncate(path, 2**28)
    with pytest.raises(CheckpointError, match="its header is larger than 64 MiB"):
        read_container(path)


def test_a_part_of_a_model(refused):
    keys = [ARCHITECTURE, ("split.no", raw.U16, 0), ("split.count", raw.U16, 2)]
    refused(raw.whole(keys, []), "is one of several parts: join them with `llama-gguf-split --merge`")


def test_no_file_and_no_regular_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"There is no file .*x\.gguf"):
        read_container(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="cannot be read as a GGUF file"):
        read_container(tmp_path)


class Zeros:
    """A checkpoint of nothing."""

    dtype = "float32"

    def __init__(self, config):
        self.config = config

    def read(self, name):
        return np.zeros(weight_map(self.config)[name].shape, "float32")


@pytest.fixture(scope="session")
def contents(tmp_path_factory) -> list[bytes]:
    """A file put together by hand, and one with a tokenizer."""
    path = tmp_path_factory.mktemp("fuzz") / "x.gguf"
    with pytest.warns(UserWarning, match="GGUF has no key for it"):
        write_gguf(path, Zeros(tiny.backbone(num_layers=1).config), tiny.proto(), dtype="bfloat16")
    return [raw.whole(raw.smallest_keys(), raw.smallest_tensors()), path.read_bytes()]


CHANGE = st.tuples(st.sampled_from(["flip", "write", "insert", "cut", "copy"]), st.floats(0, 1), st.binary(max_size=9))


@settings(max_examples=300)
@given(data=st.data())
def test_whatever_is_changed_in_a_file_it_is_read_or_refused(contents, tmp_path_factory, data):
    content = bytearray(contents[data.draw(st.integers(0, 1))])
    for kind, where, new in data.draw(st.lists(CHANGE, min_size=1, max_size=4)):
        # Most of the file is numbers of tensors, which may be anything: its beginning is what counts.
        place = int(where**3 * (len(content) - 1)) if content else 0
        if kind == "flip" and content:
            content[place] ^= 1 << (new[0] % 8 if new else 0)
        elif kind == "write":
            content[place : place + len(new)] = new
        elif kind == "insert":
            content[place:place] = new
        elif kind == "cut":
            del content[place:]
        else:
            content[place:place] = content[place : place + 40]
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(content)
    message = ""
    tracemalloc.start()
    try:
        checkpoint = GgufCheckpoint(path)
        for name, weight in weight_map(checkpoint.config).items():
            assert checkpoint.read(name).shape == weight.shape
        assert all(isinstance(i, int) for i in checkpoint.stop_token_ids)
        proto = checkpoint.tokenizer_proto()
        assert proto is None or isinstance(proto, bytes)
    except CheckpointError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**24
    assert len(message) < 1000
