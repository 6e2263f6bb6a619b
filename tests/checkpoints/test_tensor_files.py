from __future__ import annotations

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemma2_keras.checkpoints.tensor_files import LARGEST_HEADER, TensorFile, write_tensors
from gemma2_keras.errors import CheckpointError

pytestmark = pytest.mark.once

DTYPES = ["float32", "bfloat16", "float16"]


def tensors(dtype: str = "float32") -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"b": (3, 5), "a": (7,), "scalar": (), "empty": (0, 4), "\u00e9": (2, 1, 3)}
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(path, values: dict[str, np.ndarray], dtype: str = "float32") -> None:
    write_tensors(path, {name: value.shape for name, value in values.items()}, dtype, values.__getitem__)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read_here_and_by_the_library(tmp_path, dtype):
    path, values = tmp_path / "x.safetensors", tensors(dtype)
    write(path, values, dtype)
    file, theirs = TensorFile(path), safetensors.numpy.load_file(path)
    assert file.entries.keys() == theirs.keys() == values.keys()
    for name, value in values.items():
        assert file.read(name).dtype == dtype
        assert file.read(name).tobytes() == theirs[name].tobytes() == value.tobytes()
        assert file.read(name).shape == theirs[name].shape == value.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_library_writes_is_read(tmp_path, dtype):
    path, values = tmp_path / "x.safetensors", tensors(dtype)
    safetensors.numpy.save_file(values, path, metadata={"format": "pt"})
    file = TensorFile(path)
    for name, value in values.items():
        assert file.read(name).tobytes() == value.tobytes()
        assert file.read(name).shape == value.shape


def test_data_begins_where_a_backend_can_use_it(tmp_path):
    write(tmp_path / "x", tensors())
    assert min(entry.offset for entry in TensorFile(tmp_path / "x").entries.values()) % 64 == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensors_are_converted_as_they_are_written(tmp_path, dtype):
    values = tensors()
    write(tmp_path / "x", values, dtype)
    for name, value in values.items():
        np.testing.assert_array_equal(TensorFile(tmp_path / "x").read(name), value.astype(dtype))


def test_a_tensor_of_another_shape_than_announced_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"'a' has shape \(3,\), where \(2,\) was announced"):
        write_tensors(tmp_path / "x", {"a": (2,)}, "float32", lambda name: np.zeros(3, "float32"))


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    shapes = {f"t{i}": (256, 1024) for i in range(24)}
    tracemalloc.start()
    write_tensors(tmp_path / "x", shapes, "float32", lambda name: np.ones(shapes[name], "float32"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20
    assert (tmp_path / "x").stat().st_size > 24 * 2**20


def test_what_is_written_into_a_tensor_does_not_reach_the_file(tmp_path):
    write(tmp_path / "x", tensors())
    before = (tmp_path / "x").read_bytes()
    TensorFile(tmp_path / "x").read("a")[...] = 5
    assert (tmp_path / "x").read_bytes() == before
    np.testing.assert_array_equal(TensorFile(tmp_path / "x").read("a"), tensors()["a"])


def header(path, value, data: bytes = b"", length: int | None = None) -> None:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def test_a_tensor_that_lies_at_an_odd_place_is_read(tmp_path):
    values = np.array([1.5, -2.0], "float32")
    header(tmp_path / "x", json.dumps({"a": entry()}).encode() + b" ", values.tobytes())
    offset = TensorFile(tmp_path / "x").entries["a"].offset
    assert offset % 2 or offset % 4
    np.testing.assert_array_equal(TensorFile(tmp_path / "x").read("a"), values)


@pytest.mark.parametrize(
    ("value", "data", "message"),
    [
        ({"a": entry(offsets=(0, 7))}, b"0" * 7, "'a' has 7 bytes, which its shape and dtype have not"),
        ({"a": entry(shape=(3,))}, b"0" * 8, "'a' has 8 bytes"),
        ({"a": entry(shape=(2**62, 2**62))}, b"0" * 8, "'a' has 8 bytes"),
        ({"a": entry(shape=[2] * 33)}, b"0" * 8, "shape or the offsets of 'a' are none"),
        ({"a": entry(shape=(-2,))}, b"0" * 8, "shape or the offsets of 'a' are none"),
        ({"a": entry(shape=(2.0,))}, b"0" * 8, "shape or the offsets of 'a' are none"),
        ({"a": entry(shape=(True, 2))}, b"0" * 8, "shape or the offsets of 'a' are none"),
        ({"a": entry(offsets=(8, 0))}, b"0" * 8, "shape or the offsets of 'a' are none"),
        ({"a": entry(offsets=(0, 8, 8))}, b"0" * 8, "shape or the offsets of 'a' are none"),
        ({"a": entry(offsets=(0, 2**70))}, b"0" * 8, "shape or the offsets of 'a' are none"),
        ({"a": entry(dtype="F128")}, b"0" * 8, "'a' has the unknown dtype 'F128'"),
        ({"a": entry(dtype=["F32"])}, b"0" * 8, "'a' has the unknown dtype"),
        ({"a": entry(more=1)}, b"0" * 8, "has not just dtype, shape and data_offsets"),
        ({"a": [1]}, b"0" * 8, "has not just dtype, shape and data_offsets"),
        ({"a": entry()}, b"0" * 9, "its tensors end at byte .*, the file at"),
        ({"a": entry()}, b"0" * 7, "its tensors end at byte .*, the file at"),
        ({"a": entry(), "b": entry()}, b"0" * 8, "'b' begins at byte .*, not at .* where the one before ends"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, b"0" * 12, "'b' begins at byte"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, b"0" * 20, "'b' begins at byte"),
        ({"a": entry(offsets=(8, 16))}, b"0" * 16, "'a' begins at byte"),
        ({"__metadata__": {"x": 1}}, b"", "__metadata__ is no object of texts"),
        ({"__metadata__": []}, b"", "__metadata__ is no object of texts"),
        (b'{"a": 1, "a": 2}', b"", "key 'a' stands twice"),
        (b"[" * 100_000, b"", "nested too deeply"),
        (b"\xff\xfe", b"", "codec can't decode"),
        ({"a" * 10_000: 5}, b"", "entry of 'a{80}' has not just"),
    ],
)
def test_a_header_that_lies(tmp_path, value, data, message):
    header(tmp_path / "x", value, data)
    with pytest.raises(
        CheckpointError, match=rf"x is truncated or broken \((.*{message}.*)\). Copy or download"
    ) as error:
        TensorFile(tmp_path / "x")
    assert len(str(error.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, LARGEST_HEADER + 1, 3])
def test_the_length_of_a_header_is_bounded_before_it_is_read(tmp_path, length):
    header(tmp_path / "x", b"{}", length=length)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"its header is said to have {length} bytes"):
        TensorFile(tmp_path / "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_header_beyond_the_limit_is_refused_though_the_file_has_it(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.write(struct.pack("<Q", LARGEST_HEADER + 1))
        file.truncate(LARGEST_HEADER + 9)
    with pytest.raises(CheckpointError, match="its header is said to have"):
        TensorFile(tmp_path / "x")


@pytest.mark.parametrize("dtype", ["F64", "I64", "I8", "BOOL", "F8_E4M3", "F4"])
def test_a_dtype_of_the_format_that_no_weight_has_is_named(tmp_path, dtype):
    bits = {"F64": 64, "I64": 64, "F4": 4}.get(dtype, 8)
    header(tmp_path / "x", {"a": entry(dtype, (2,), (0, 2 * bits // 8))}, b"0" * (2 * bits // 8))
    with pytest.raises(CheckpointError, match=f"Tensor 'a' has dtype {dtype}; allowed: F32, BF16, F16"):
        TensorFile(tmp_path / "x").read("a")


def test_a_file_that_became_shorter_is_told(tmp_path):
    write(tmp_path / "x", tensors())
    file = TensorFile(tmp_path / "x")
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has become shorter while it was read"):
        file.read("a")


def test_what_is_no_file_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="lacks the file x"):
        TensorFile(tmp_path / "x")
    with pytest.raises(CheckpointError, match="no regular file"):
        TensorFile(tmp_path)


SMALL = {"a": np.arange(6, dtype="float32").reshape(2, 3), "b": np.ones(4, ml_dtypes.bfloat16)}


@settings(max_examples=1500)
@given(data=st.data())
@example(data=None)
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    safetensors.numpy.save_file(SMALL, path)
    content = bytearray(path.read_bytes())
    if data is not None:
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, len(content)))
            end = min(len(content), place + data.draw(st.sampled_from([0, 1, 1, 1, 8, 100])))
            content[place:end] = data.draw(
                st.binary(max_size=9) | st.sampled_from([b'"', b"{", b"9" * 20, b"-1", b"e9"])
            )
    path.write_bytes(content)
    try:
        file = TensorFile(path)
        values = [file.read(name) for name in file.entries]
    except CheckpointError:
        return
    assert sum(value.nbytes for value in values) <= len(content)
