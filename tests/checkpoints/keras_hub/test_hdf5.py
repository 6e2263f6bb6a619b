from __future__ import annotations

import itertools
import re
import struct
import time
import tracemalloc

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma2_keras.checkpoints.keras_hub.hdf5 import Hdf5File
from gemma2_keras.errors import CheckpointError

pytestmark = pytest.mark.once
NAME = "layers/gemma_decoder_block/ffw_linear/vars/0"


def write_array(file, name: str, value: np.ndarray) -> None:
    """As Keras writes it."""
    if value.dtype == ml_dtypes.bfloat16:
        file.create_dataset(name, data=value.view("V2")).attrs["dtype"] = "bfloat16"
    else:
        file[name] = value


def make(path, fill=lambda file: None, **kwargs):
    with h5py.File(path, "w", **kwargs) as file:
        file[NAME] = np.arange(12, dtype="float32").reshape(3, 4)
        fill(file)
    return path


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.weights.h5"


@pytest.fixture
def whole(path) -> bytes:
    return make(path, lambda file: write_array(file, "b/0", np.ones((2, 3), ml_dtypes.bfloat16))).read_bytes()


def assert_refused(path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Hdf5File(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


# What Keras writes

GROUPS = st.lists(st.text("ab_0.", min_size=1, max_size=12).filter(lambda t: t.strip(".")), min_size=1, max_size=4)
SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)
DTYPES = st.sampled_from(["float32", "float16", "bfloat16"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(GROUPS, SHAPES, DTYPES), max_size=40), st.integers(0, 2**32 - 1))
def test_every_array_that_h5py_writes_is_found_and_read(path, drawn, seed):
    random = np.random.default_rng(seed)
    expected = {}
    for groups, shape, dtype in drawn:
        # No array may stand where another has a group.
        name = "/".join([*(f"g{group}" for group in groups), "0"])
        dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        expected[name] = random.standard_normal(shape).astype(dtype)
    with h5py.File(path, "w") as file:
        for name, value in expected.items():
            write_array(file, name, value)
    found = Hdf5File(path)
    assert found.arrays.keys() == expected.keys()
    for name, value in expected.items():
        read = found.read(name)
        assert (read.dtype, read.shape) == (value.dtype, value.shape)
        assert read.tobytes() == value.tobytes()
        assert read.flags.aligned
        assert type(read) is np.ndarray


def test_arrays_and_the_file_do_not_change_with_each_other(path):
    make(path)
    before, value = path.read_bytes(), Hdf5File(path).read(NAME)
    expected = value.copy()
    # As Keras writes such files: in place.
    with open(path, "r+b") as file:
        file.write(b"\xff" * len(before))
    np.testing.assert_array_equal(value, expected)
    path.write_bytes(before)
    value[...] = 0
    assert path.read_bytes() == before


def test_a_group_of_many_members_is_read_whole(path):
    def fill(file):
        for i in range(1500):
            file.create_group(f"layers/block_{i}/vars")["0"] = np.float32([i])

    make(path, fill)
    file = Hdf5File(path)
    assert len(file.arrays) == 1501
    assert all(file.read(f"layers/block_{i}/vars/0") == i for i in range(1500))


def test_attributes_beside_the_dtype_do_not_matter(path):
    def fill(file):
        file[NAME].attrs.update({f"attribute {i}": np.zeros(i) for i in range(30)})
        file["layers"].attrs["name"] = "x" * 10_000

    make(path, fill)
    assert Hdf5File(path).arrays[NAME].shape == (3, 4)


def test_the_note_of_bfloat16_may_be_a_text_of_fixed_length(path):
    def fill(file):
        file.create_dataset("b", data=np.ones(3, ml_dtypes.bfloat16).view("V2")).attrs["dtype"] = np.bytes_("bfloat16")

    make(path, fill)
    np.testing.assert_array_equal(Hdf5File(path).read("b"), np.ones(3, ml_dtypes.bfloat16))


# What Keras does not write


def virtual(file):
    layout = h5py.VirtualLayout((5,), "float32")
    layout[:] = h5py.VirtualSource("other.h5", "x", (5,))
    file.create_virtual_dataset("x", layout)


def compact(file):
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.COMPACT)
    h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((3,)), plan)


def named_type(file):
    file["type"] = np.dtype("float32")
    file.create_dataset("x", (3,), file["type"])


def external_storage(file):
    file.create_dataset("x", (5,), "float32", external=[("/etc/passwd", 0, 20)])


FOREIGN = {
    "external link": (lambda f: f.update({"x": h5py.ExternalLink("/etc/passwd", "/x")}), "holds external links"),
    "soft link": (lambda f: f.update({"x": h5py.SoftLink(f"/{NAME}")}), "holds soft links"),
    "hard link": (lambda f: f.update({"x": f[NAME]}), "stands in two places"),
    "cycle": (lambda f: f["layers"].update({"x": f["/"]}), "stands in two places"),
    "external storage": (external_storage, r"holds arrays in other files \(external storage\)"),
    "virtual": (virtual, r"holds arrays of virtual layout \('x'\)"),
    "chunks": (lambda f: f.create_dataset("x", data=np.ones(5), chunks=(2,)), "holds arrays of chunked layout"),
    "chunks without data": (lambda f: f.create_dataset("x", (10**12, 10**5), chunks=(1, 1)), "of chunked layout"),
    "compression": (
        lambda f: f.create_dataset("x", data=np.ones(5), compression="gzip"),
        "holds compressed or otherwise filtered arrays",
    ),
    "compact": (compact, "holds arrays of compact layout"),
    "named type": (named_type, "holds data types shared between arrays"),
    "records": (lambda f: f.update({"x": np.zeros(3, [("a", "f4")])}), r"holds records \('x'\)"),
    "text": (lambda f: f.update({"x": "text"}), "holds texts or sequences of any length"),
    "bytes": (lambda f: f.update({"x": np.bytes_("text")}), "holds texts"),
    "objects": (lambda f: f.update({"x": ["a", "bc"]}), "holds texts or sequences of any length"),
    "references": (lambda f: f.create_dataset("x", data=f["layers"].ref, dtype=h5py.ref_dtype), "holds references"),
    "enumeration": (lambda f: f.update({"x": np.array([True])}), "holds enumerations"),
    "float64": (lambda f: f.update({"x": np.ones(3)}), "numbers that are neither float32 nor float16 nor bfloat16"),
    "big-endian": (lambda f: f.update({"x": np.ones(3, ">f4")}), "numbers that are neither float32"),
    "int8": (lambda f: f.update({"x": np.ones(3, "int8")}), r"holds whole numbers \('x'\)"),
    "opaque": (lambda f: f.update({"x": np.ones(3, "V2")}), "holds opaque values without the attribute dtype=bfloat16"),
    "float32 that says bfloat16": (lambda f: f[NAME].attrs.update({"dtype": "bfloat16"}), "says that it is bfloat16"),
    "never written": (lambda f: f.create_dataset("x", (10**12, 10**5), "float32"), "'x' has no data"),
    "empty": (lambda f: f.update({"x": np.zeros((0, 3), "float32")}), "'x' has no data"),
    "no shape": (lambda f: f.update({"x": h5py.Empty("float32")}), "'x' has no shape"),
    "many dimensions": (lambda f: f.update({"x": np.zeros((1,) * 9, "float32")}), "no shape of at most 8 dimensions"),
    "links in order": (lambda f: f.create_group("x", track_order=True), "holds object headers of a later format"),
    "a name that cannot be shown": (lambda f: f.create_group("a\nb"), "without a plain name"),
    "another alphabet": (lambda f: f.create_group("ключ"), "holds groups of a later format"),
    "a long name": (lambda f: f.create_group("a" * 300), "without a plain name"),
    "deep groups": (lambda f: f.create_group("/".join(["a" * 20] * 13)), "names of more than 255 bytes"),
}


@pytest.mark.parametrize(("fill", "message"), FOREIGN.values(), ids=FOREIGN)
def test_what_keras_does_not_write_is_refused(path, fill, message):
    assert_refused(make(path, fill), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"libver": "latest"}, "holds a superblock of version 3"),
        ({"libver": "v108"}, "holds a superblock of version 2"),
        ({"userblock_size": 512}, "is no HDF5 file, or truncated"),
    ],
)
def test_other_versions_of_the_format_are_refused(path, options, message):
    assert_refused(make(path, **options), message)


def test_a_file_of_too_many_groups_is_refused_without_reading_on(path, monkeypatch):
    monkeypatch.setattr("gemma2_keras.checkpoints.keras_hub.hdf5._MOST_MEMBERS", 50)
    assert_refused(make(path, lambda f: [f.create_group(f"g{i}") for i in range(60)]), "more than 50 objects")


def test_a_file_of_too_much_structure_is_refused(path, monkeypatch):
    monkeypatch.setattr("gemma2_keras.checkpoints.keras_hub.hdf5.MOST_METADATA", 5_000)
    assert_refused(make(path, lambda f: [f.create_group(f"g{i}") for i in range(60)]), "more than 5000 bytes of struc")


# Broken files


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89HDF",
        b"\0" * 5000,
        np.random.default_rng(0).bytes(5000),
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=["empty", "four bytes", "zeros", "random", "git lfs"],
)
def test_a_file_that_is_no_hdf5(path, content):
    path.write_bytes(content)
    assert_refused(path, "is no HDF5 file, or truncated. Copy or download the file again")


def test_no_file_at_all(path):
    with pytest.raises(CheckpointError, match=r"lacks the file model\.weights\.h5"):
        Hdf5File(path)
    path.mkdir()
    assert_refused(path, "is no regular file")


@pytest.mark.parametrize("length", [95, 96, 100, 800, 2048, -1])
def test_a_truncated_file(path, whole, length):
    path.write_bytes(whole[:length])
    assert_refused(path, "truncated")


def test_a_file_that_becomes_shorter_after_it_was_checked(path, whole):
    file = Hdf5File(path)
    path.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="has changed while it was read"):
        file.read(NAME)


# The header of one array, in the order in which h5py writes its messages, and of what it says.
SHAPE = struct.pack("<QQ", 3, 4)
FLOAT32 = bytes.fromhex("11201f000400000000002000170800177f000000")
LAYOUT = struct.pack("<BBQQ", 3, 1, 2048, 48)


def layout(offset: int, nbytes: int) -> bytes:
    return struct.pack("<BBQQ", 3, 1, offset, nbytes)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (LAYOUT, layout(10**15, 48), "ends at 1000000000000048, the file at"),
        (LAYOUT, layout(2**64 - 8, 48), "ends at"),
        (LAYOUT, layout(2**64 - 1, 48), "has no data"),
        (LAYOUT, layout(2048, 10**15), r"has 1000000000000000 bytes for the shape \(3, 4\)"),
        (LAYOUT, layout(2048, 0), r"has 0 bytes for the shape"),
        (LAYOUT, struct.pack("<BBQQ", 1, 1, 2048, 48), "layout of version 1"),
        (LAYOUT, struct.pack("<BBQQ", 3, 9, 2048, 48), "unknown layout"),
        (SHAPE, struct.pack("<QQ", 2**63, 2**63), "has 48 bytes for the shape"),
        (SHAPE, struct.pack("<QQ", 2**32, 2**32), "has 48 bytes for the shape"),
        (SHAPE, struct.pack("<QQ", 0, 4), "has 48 bytes for the shape"),
        (b"\1\2\1" + bytes(5) + SHAPE, b"\1\xff\1" + bytes(5) + SHAPE, "no shape of at most 8 dimensions"),
        (b"\1\2\1" + bytes(5) + SHAPE, b"\1\x08\1" + bytes(5) + SHAPE, "a message shorter than it must be"),
        (FLOAT32, b"\x1f" + FLOAT32[1:], "values of unknown type"),
        (FLOAT32, FLOAT32[:-1] + b"\1", "neither float32"),
        (b"HEAP", b"HEAD", "no names where they belong"),
        (b"TREE", b"TREF", "no index of a group"),
        (b"TREE\0\0", b"TREE\1\0", "no index of a group"),
        (b"TREE\0\0", b"TREE\0\x09", "no index of a group"),
        (b"SNOD", b"SNOW", "no members of a group"),
        (b"SNOD\1\0\1\0", b"SNOD\1\0\xff\xff", "an address beyond its end|without a plain name"),
    ],
)
def test_an_impossible_value(path, old, new, message):
    content = make(path).read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    assert_refused(path, message)


def test_arrays_that_overlap(path):
    content = make(path, lambda f: f.update({"x": np.ones((3, 4), "float32")})).read_bytes()
    first, second = (int(array.offset) for array in Hdf5File(path).arrays.values())
    path.write_bytes(content.replace(layout(first, 48), layout(second + 4 if second < first else second - 4, 48)))
    assert_refused(path, f"(?s)is broken: '({NAME}|x)' and '({NAME}|x)' overlap")


@pytest.mark.parametrize(
    ("place", "new"),
    [
        # The size of the root's header, of its names, and of the heap of texts.
        (96 + 8, struct.pack("<I", 2**32 - 1)),
        ("HEAP", bytes(4) + struct.pack("<Q", 2**63)),
        ("GCOL", b"\1\0\0\0" + struct.pack("<Q", 2**62)),
        ("GCOL", b"\1\0\0\0" + struct.pack("<Q", 0)),
        ("TREE", b"\0\0\xff\xff"),
    ],
)
def test_a_size_beyond_the_file_costs_nothing(path, whole, place, new):
    start = place if isinstance(place, int) else whole.index(place.encode()) + 4
    path.write_bytes(whole[:start] + new + whole[start + len(new) :])
    tracemalloc.start()
    try:
        assert_refused(path, "truncated or broken")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def chain(path, blocks: int) -> None:
    """A file whose root has a header of many continuations, each of which is in the file."""
    head = bytearray(make(path).read_bytes()[:96])
    struct.pack_into("<Q", head, 40, 96 + 16 + 24 * blocks)
    struct.pack_into("<Q", head, 64, 96)
    header = struct.pack("<BBHII4x", 1, 0, 65535, 1, 24)
    links = (struct.pack("<HHB3xQQ", 0x10, 16, 0, 112 + 24 * (i + 1), 24) for i in range(blocks))
    path.write_bytes(bytes(head) + header + b"".join(links))


def test_long_chains_end_soon(path):
    chain(path, 65_000)
    start = time.perf_counter()
    assert_refused(path, "an address beyond its end|the root is no group")
    assert time.perf_counter() - start < 5


def changes(size: int):
    place = st.integers(0, size - 1)
    word = st.sampled_from([0, 1, 8, 96, 136, 680, 800, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 2, 2**64 - 1])
    return st.lists(
        st.tuples(place, st.binary(min_size=1, max_size=4) | word.map(lambda value: struct.pack("<Q", value))),
        min_size=1,
        max_size=6,
    )


# An honest file small enough that most changes hit its structure.
@pytest.fixture(scope="session")
def honest(tmp_path_factory):
    def fill(file):
        file.create_group("vars").attrs["name"] = "backbone"
        for i in range(10):
            write_array(file, f"layers/block_{i}/vars/0", np.full((2, 3), i, ml_dtypes.bfloat16))

    return make(tmp_path_factory.mktemp("fuzz") / "model.weights.h5", fill)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_file_is_read_or_refused(honest, path, data):
    content = bytearray(honest.read_bytes())
    for place, value in data.draw(changes(len(content))):
        content[place : place + len(value)] = value
    content = content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))]
    path.write_bytes(content)
    tracemalloc.start()
    try:
        file = Hdf5File(path)
    except CheckpointError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20
    arrays = sorted(file.arrays.values(), key=lambda array: array.offset)
    assert all(a.offset + a.nbytes <= b.offset for a, b in itertools.pairwise(arrays))
    for name, array in file.arrays.items():
        assert re.fullmatch(r"[ -~]{1,255}", name)
        assert file.read(name).nbytes == array.nbytes <= len(content)
