"""Each kernel against its portable twin, and how the CPU kernels are compiled, found and called."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from keras import ops

from gemma2_keras import kernels
from gemma2_keras.kernels import native
from gemma2_keras.ops import attention as portable
from gemma2_keras.ops.cache import write_slots
from gemma2_keras.ops.feed_forward import gated_gelu as portable_gated_gelu
from gemma2_keras.ops.linear import linear as portable_linear
from gemma2_keras.ops.norm import rms_norm as portable_rms_norm
from gemma2_keras.ops.rotary import apply_rotary as portable_apply_rotary
from gemma2_keras.ops.rotary import rotary_tables

array = ops.convert_to_numpy
BACKEND = keras.backend.backend()


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype("float32")


def run(function, *arguments, **static):
    """As the engine runs it: without gradients, and compiled where that is quicker."""
    return kernels.compiled(function, [], lambda: None, None)(*arguments, **static)


@pytest.mark.once
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler here")
def test_the_kernels_compile_where_there_is_a_compiler():
    # Otherwise every test of them would be passed over.
    assert native.library() is not None


# Products


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_is_that_of_the_portable_operation(dtype):
    x, weight = ops.cast(normal(2, 3, 40), dtype), ops.cast(normal(24, 40, seed=1), dtype)
    found, expected = (run(f, x, weight) for f in (kernels.linear, portable_linear))
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    # Two sums of one number may round to neighbours.
    unit = 2.0**-7 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(array(found), array(expected), rtol=unit, atol=unit)


@pytest.mark.skipif(BACKEND != "jax" or sys.platform == "darwin", reason="XLA on a CPU")
def test_xla_makes_no_copy_of_bfloat16_weights():
    import jax

    x, weight = ops.ones((16, 256), "bfloat16"), ops.ones((1024, 256), "bfloat16")
    memory = jax.jit(kernels.linear).lower(x, weight).compile().memory_analysis()
    assert memory.temp_size_in_bytes < weight.nbytes


# Between the products

DTYPES = st.sampled_from(["float32", "bfloat16"])


def assert_close(found, expected, dtype):
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    # A bfloat16 is rounded once here, and up to three times there.
    unit = 2.0**-6 if dtype == "bfloat16" else 2e-6
    np.testing.assert_allclose(array(found).astype("float32"), array(expected).astype("float32"), rtol=unit, atol=unit)


# Elsewhere than on PyTorch they are the portable operations.
@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's own kernels")
@settings(max_examples=40)
@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 70), DTYPES, DTYPES)
def test_rms_norm_is_the_portable_operation(seed, rows, width, dtype, weight_dtype):
    x = ops.cast(normal(2, rows, width, seed=seed, scale=3.0), dtype)
    weight = ops.cast(normal(width, seed=seed + 1), weight_dtype)
    found, expected = (run(f, x, weight, epsilon=0.1) for f in (kernels.rms_norm, portable_rms_norm))
    assert_close(found, expected, dtype)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's own kernels")
@settings(max_examples=40)
@given(st.integers(0, 99), st.integers(0, 5), st.integers(1, 70), DTYPES)
@example(94, 4, 14, "float32")
def test_gated_gelu_is_the_portable_operation(seed, rows, width, dtype):
    gate, up = (ops.cast(normal(rows, width, seed=seed + i, scale=2.0), dtype) for i in range(2))
    found, expected = (run(f, gate, up) for f in (kernels.gated_gelu, portable_gated_gelu))
    assert_close(found, expected, dtype)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's own kernels")
@settings(max_examples=40)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), DTYPES)
def test_rotation_is_the_portable_operation(seed, batch, length, half, dtype):
    x = ops.cast(normal(batch, length, 3, 2 * half, seed=seed), dtype)
    positions = np.random.default_rng(seed).integers(0, 500, (batch, length)).astype("int32")
    tables = rotary_tables(positions, 2 * half, 10000.0)
    found, expected = (run(f, x, *tables) for f in (kernels.apply_rotary, portable_apply_rotary))
    assert_close(found, expected, dtype)


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's own kernels")
def test_large_arrays_are_shared_by_threads(monkeypatch):
    monkeypatch.setattr(native, "threads", lambda: 3)
    gate, up = (ops.cast(normal(100, 3001, seed=i), "float32") for i in range(2))
    assert_close(run(kernels.gated_gelu, gate, up), portable_gated_gelu(gate, up), "float32")
    weight = ops.cast(normal(3001), "float32")
    found = run(kernels.rms_norm, gate, weight, epsilon=1e-6)
    assert_close(found, portable_rms_norm(gate, weight, 1e-6), "float32")


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's own kernels")
def test_what_is_not_a_number_stays_so():
    bad = np.array([[1.0, np.nan, 2.0] * 10, [np.inf, 1.0, 2.0] * 10], "float32")
    for dtype in ("float32", "bfloat16"):
        x = ops.cast(bad, dtype)
        found = array(ops.cast(run(kernels.gated_gelu, x, ops.ones_like(x)), "float32"))
        np.testing.assert_array_equal(np.isnan(found), np.isnan(bad))
        assert np.isnan(array(ops.cast(run(kernels.rms_norm, x, x[0] * 0 + 1, epsilon=1e-6), "float32"))[0]).all()


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's own kernels")
def test_gradients_go_through_what_has_kernels_without_them():
    x, weight = (ops.cast(normal(4, 6, seed=i), "float32").requires_grad_() for i in range(2))
    for function, arguments in (
        (kernels.rms_norm, (x, weight[0], 1e-6)),
        (kernels.gated_gelu, (x, weight)),
        (kernels.apply_rotary, (x[:, None, None], weight[:, None, None, :3], weight[:, None, None, 3:])),
    ):
        x.grad = None
        ops.sum(function(*arguments)).backward()
        assert float(ops.max(ops.abs(x.grad))) > 0


# Attention

# On JAX and TensorFlow the kernel is the portable operation itself, and each shape would be compiled.
EXAMPLES = settings(max_examples=60 if BACKEND == "torch" else 5)


def problem(seed, batch, length, keys, groups, key_heads, size):
    """A random mask, half of it seen, and some queries that see nothing."""
    random = np.random.default_rng(seed)
    mask = random.random((batch, length, keys)) < random.choice([0.05, 0.5, 1.0])
    return (
        normal(batch, length, groups * key_heads, size, seed=seed, scale=3.0),
        normal(batch, keys, key_heads, size, seed=seed + 1),
        normal(batch, keys, key_heads, size, seed=seed + 2),
        mask,
    )


@EXAMPLES
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    length=st.integers(1, 35),
    keys=st.integers(1, 140),
    groups=st.integers(1, 5),
    key_heads=st.integers(1, 3),
    size=st.sampled_from([2, 6, 16, 18, 40]),
    cap=st.sampled_from([None, 10.0, 0.7]),
)
@example(seed=1, batch=2, length=16, keys=64, groups=2, key_heads=2, size=16, cap=10.0)
@example(seed=2, batch=1, length=17, keys=65, groups=3, key_heads=2, size=18, cap=None)
@example(seed=3, batch=2, length=33, keys=129, groups=1, key_heads=1, size=6, cap=10.0)
def test_attention_is_that_of_the_portable_operation(seed, batch, length, keys, groups, key_heads, size, cap):
    query, key, value, mask = problem(seed, batch, length, keys, groups, key_heads, size)
    found, expected = (
        array(run(lambda *x, f=f: f(*x, 0.1, cap), query, key, value, mask))
        for f in (kernels.attention, portable.attention)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_attention_over_a_causal_window_longer_than_several_blocks():
    length, window = 150, 70
    query, key, value, _ = problem(0, 1, length, length, 2, 2, 10)
    place = np.arange(length)
    mask = ((place[None] <= place[:, None]) & (place[:, None] - place[None] < window))[None]
    found, expected = (
        array(run(lambda *x, f=f: f(*x, 0.4, 10.0), query, key, value, mask))
        for f in (kernels.attention, portable.attention)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [None, 10.0])
def test_attention_in_half_precision_errs_no_more_than_the_portable_operation(cap):
    *pair, mask = problem(4, 2, 33, 129, 3, 2, 18)
    halves = [ops.cast(x, "bfloat16") for x in pair]
    mask[:, :, 0] = True
    exact = array(portable.attention(*(ops.cast(x, "float32") for x in halves), ops.convert_to_tensor(mask), 0.4, cap))
    found, expected = (
        run(lambda *x, f=f: f(*x, 0.4, cap), *halves, mask) for f in (kernels.attention, portable.attention)
    )
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    errors = [np.abs(array(ops.cast(x, "float32")) - exact) for x in (found, expected)]
    assert errors[0].mean() <= errors[1].mean() * 1.01
    assert errors[0].max() <= errors[1].max() * 1.1


def gradients(function, cotangent, *tensors):
    """Those of the sum of `function`'s result times `cotangent` with respect to `tensors`."""
    if BACKEND == "jax":
        import jax

        found = jax.jit(jax.grad(lambda *x: ops.sum(function(*x) * cotangent), range(len(tensors))))(*tensors)
    elif BACKEND == "torch":
        tensors = [x.detach().requires_grad_() for x in tensors]
        ops.sum(function(*tensors) * cotangent).backward()
        found = [x.grad for x in tensors]
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            total = ops.sum(function(*tensors) * cotangent)
        found = tape.gradient(total, tensors)
    return [array(ops.cast(x, "float32")) for x in found]


@settings(max_examples=40 if BACKEND == "torch" else 5)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    length=st.integers(2, 80),
    keys=st.integers(2, 150),
    groups=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    size=st.integers(1, 40),
    cap=st.sampled_from([None, 10.0, 1.0]),
)
def test_gradients_of_attention_are_those_of_the_portable_operation(
    seed, batch, length, keys, groups, key_heads, size, cap
):
    *pair, mask = problem(seed, batch, length, keys, groups, key_heads, size)
    tensors, mask = [ops.convert_to_tensor(x) for x in pair], ops.convert_to_tensor(mask)
    cotangent = normal(batch, length, groups * key_heads, size, seed=seed)
    found, expected = (
        gradients(lambda *x, f=f: f(*x, mask, 0.3, cap), ops.convert_to_tensor(cotangent), *tensors)
        for f in (kernels.attention, portable.attention)
    )
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(theirs).max()))


def test_gradients_of_attention_in_half_precision_are_near_the_truth():
    *pair, mask = problem(4, 2, 33, 70, 3, 2, 18)
    mask[:, :, 0] = True
    mask = ops.convert_to_tensor(mask)
    halves = [ops.cast(x, "bfloat16") for x in pair]
    cotangent = ops.cast(normal(2, 33, 6, 18, seed=7), "bfloat16")
    whole = [ops.cast(x, "float32") for x in (cotangent, *halves)]
    exact = gradients(lambda *x: portable.attention(*x, mask, 0.4, 10.0), *whole)
    found, usual = (
        gradients(lambda *x, f=f: f(*x, mask, 0.4, 10.0), cotangent, *halves)
        for f in (kernels.attention, portable.attention)
    )
    for mine, theirs, truth in zip(found, usual, exact, strict=True):
        assert np.linalg.norm(mine - truth) <= 1.05 * np.linalg.norm(theirs - truth)


@pytest.mark.skipif(BACKEND != "jax", reason="JAX alone calls it from within a program")
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler here")
def test_xla_calls_the_attention_of_the_cpu():
    import jax

    query, key, value, mask = problem(5, 2, 5, 7, 2, 2, 6)

    def total(query):
        return kernels.attention(query, key, value, mask, 0.4, 10.0).sum()

    program = jax.jit(jax.grad(total)).lower(query).as_text()
    assert "gemma2_attention_gradient" in program
    # Its memory does not grow with the number of queries times keys.
    assert "5x7xf32" not in program


def test_attention_reads_tensors_that_lie_in_pieces():
    query, key, value, mask = problem(5, 2, 5, 7, 2, 2, 6)
    whole = [ops.convert_to_tensor(x) for x in (query, key, value, mask)]
    pieces = [ops.convert_to_tensor(np.ascontiguousarray(x.swapaxes(1, 2))) for x in (query, key, value, mask)]
    found = kernels.attention(*(ops.swapaxes(x, 1, 2) for x in pieces), 0.4, 10.0)
    np.testing.assert_allclose(array(found), array(kernels.attention(*whole, 0.4, 10.0)), rtol=1e-6, atol=1e-6)


# Slots


@settings(max_examples=20 if BACKEND == "torch" else 5)
@given(
    st.lists(st.integers(0, 6), min_size=4, max_size=4), st.sampled_from(["float32", "bfloat16"]), st.integers(0, 99)
)
def test_slots_are_written_as_by_the_portable_operation(slots, dtype, seed):
    buffer = ops.cast(normal(4, 7, 2, 3, seed=seed), dtype)
    values, slots = normal(4, 1, 2, 3, seed=seed + 1), np.asarray(slots, "int32")
    expected = array(ops.cast(run(write_slots, ops.copy(buffer), slots, values), "float32"))
    before = array(ops.cast(buffer, "float32"))
    found = run(kernels.write_slots, buffer, slots, values)
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    found = array(ops.cast(found, "float32"))
    np.testing.assert_array_equal(found, expected)
    assert (found != before).any(axis=(2, 3)).sum() == 4


# Memory


def contents(where, shape, dtype="float32"):
    pointer = ctypes.cast(where, ctypes.POINTER(ctypes.c_uint8))
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array(pointer, (size,)).view(dtype).reshape(shape)


def test_a_variable_is_stored_where_it_is_found():
    values = normal(5, 3)
    variable = keras.Variable(values)
    first, kept = native.address(kernels.stored(variable))
    np.testing.assert_array_equal(contents(first, (5, 3)), values)
    again, _ = native.address(kernels.stored(variable))
    assert again == first
    del kept


def test_an_address_outlives_the_tensor_while_what_holds_it_is_kept():
    where, kept = native.address(ops.convert_to_tensor(np.full((300, 100), 7.0, "float32")))
    others = [ops.full((300, 100), float(i)) for i in range(5)]
    assert (contents(where, (300, 100)) == 7).all()
    assert len(others) == 5
    del kept


def test_an_address_of_half_precision_is_that_of_its_bits():
    where, kept = native.address(kernels.stored(keras.Variable([1.0, -2.0], dtype="bfloat16")))
    assert contents(where, (2,), "uint16").tolist() == [0x3F80, 0xC000]
    del kept


@pytest.mark.once
def test_a_tensor_in_pieces_has_no_address():
    whole = np.arange(24, dtype="float32").reshape(4, 6)
    for pieces in (whole.T, whole[:, :3], whole[::2], np.lib.stride_tricks.as_strided(whole, (3, 2), (0, 0))):
        with pytest.raises(ValueError, match="one piece"):
            native.address(pieces)
    # Axes of one element have any stride; a row of many begins where it says.
    for one in (whole[2:3], whole[1:], whole[:1, 1:4]):
        where, kept = native.address(one)
        assert where == one.ctypes.data
        del kept


@pytest.mark.once
def test_a_tensor_elsewhere_has_no_address():
    class Elsewhere:
        def __dlpack_device__(self):
            return (2, 0)

    assert not native.is_on_cpu(Elsewhere())
    with pytest.raises(ValueError, match="CPU"):
        native.address(Elsewhere())


def test_tensors_of_the_backend_lie_on_the_cpu_here():
    assert native.is_on_cpu(kernels.stored(keras.Variable([1.0])))


# Threads


@pytest.mark.once
def test_threads_are_those_asked_for(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert native.threads() == 3
    available = len(os.sched_getaffinity(0))
    for nonsense in ("0", "", "-2", "two", "1.5"):
        monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
        assert native.threads() == available
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert native.threads() == available


# Compiling


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """The library as if never compiled or loaded: its folder is a new one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    native.library.cache_clear()
    yield tmp_path / "gemma2_keras"
    native.library.cache_clear()


def script(folder, lines):
    path = folder / "compiler"
    path.write_text("#!/bin/sh\n" + lines)
    path.chmod(0o700)
    return str(path)


def compiler():
    found = native.shutil.which("g++") or native.shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.once
def test_without_a_compiler_there_is_no_library(anew, monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.library() is None
    assert not anew.exists()


@pytest.mark.once
def test_without_a_compiler_attention_is_the_portable_one(anew, monkeypatch):
    if BACKEND == "jax":
        from gemma2_keras.kernels import jax

        # Asked anew.
        monkeypatch.setattr(jax, "_has_kernels", jax._has_kernels.__wrapped__)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    query, key, value, mask = problem(6, 1, 5, 7, 2, 2, 6)
    found = run(lambda *x: kernels.attention(*x, 0.4, 10.0), query, key, value, mask)
    expected = run(lambda *x: portable.attention(*x, 0.4, 10.0), query, key, value, mask)
    np.testing.assert_array_equal(array(found), array(expected))


@pytest.mark.once
@pytest.mark.parametrize(
    "lines",
    [
        "exit 1",
        "[ $1 = --version ] && exit 0; exit 1",
        "[ $1 = --version ] && exit 0; for last; do :; done; echo half > $last; exit 1",
        "[ $1 = --version ] && exit 0; kill -9 $$",
    ],
    ids=["no compiler at all", "compiles nothing", "writes half a file", "is killed"],
)
def test_a_compiler_that_fails_gives_no_library_and_leaves_nothing(anew, monkeypatch, tmp_path, lines):
    monkeypatch.setenv("CXX", script(tmp_path, lines))
    assert native.library() is None
    assert not anew.exists() or names(anew) == []


@pytest.mark.once
@pytest.mark.parametrize("path", ["/nonexistent/compiler", "/", "/bin/false"])
def test_what_is_no_compiler_gives_no_library(anew, monkeypatch, path):
    monkeypatch.setenv("CXX", path)
    assert native.library() is None


@pytest.mark.once
def test_a_compiler_that_takes_too_long_is_given_up(anew, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path, "[ $1 = --version ] && exit 0; exec sleep 60"))
    monkeypatch.setattr(native, "_COMPILE_SECONDS", 0.2)
    assert native.library() is None
    assert names(anew) == []


@pytest.mark.once
def test_what_a_compiler_made_and_is_no_library_is_not_used(anew, monkeypatch, tmp_path):
    lines = "[ $1 = --version ] && exit 0; for last; do :; done; echo text > $last"
    monkeypatch.setenv("CXX", script(tmp_path, lines))
    assert native.library() is None


@pytest.mark.once
def test_the_library_is_compiled_once_into_a_folder_of_the_user_alone(anew, monkeypatch):
    compiler()
    assert native.library() is not None
    (name,) = names(anew)
    assert stat.S_IMODE(anew.stat().st_mode) == 0o700
    native.library.cache_clear()
    before = (anew / name).stat().st_mtime_ns
    monkeypatch.setattr(native.tempfile, "TemporaryDirectory", None)
    assert native.library() is not None
    assert (anew / name).stat().st_mtime_ns == before


@pytest.mark.once
def test_other_flags_and_other_processors_have_libraries_of_their_own(anew, monkeypatch, tmp_path):
    lines = "[ $1 = --version ] && exit 0; for last; do :; done; echo text > $last"
    fake = script(tmp_path, lines)
    anew.mkdir()
    native._compiled([fake], anew, "native.cpp", None)
    native._compiled([fake], anew, "native.cpp", None)
    assert len(names(anew)) == 1
    monkeypatch.setattr(native, "_FLAGS", ("-O0",))
    native._compiled([fake], anew, "native.cpp", None)
    assert len(names(anew)) == 2
    monkeypatch.setattr(native, "_processor", lambda: "another")
    native._compiled([fake], anew, "native.cpp", None)
    assert len(names(anew)) == 3


@pytest.mark.once
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_not_used(anew, monkeypatch, tmp_path, mode):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    anew.mkdir()
    anew.chmod(mode)
    with native._cache_folder() as folder:
        assert Path(folder) != anew
        assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700
    # Only a folder that is used again stays.
    assert not Path(folder).exists()


@pytest.mark.once
def test_a_file_in_the_place_of_the_folder_is_no_hindrance(anew, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    anew.write_text("a file")
    with native._cache_folder() as folder:
        assert Path(folder).is_dir()


# The package itself would import a backend, which takes longer than compiling.
COMPILING = """
import importlib.util, sys
name, path, folder = "gemma2_keras.kernels", *sys.argv[1:]
spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[folder])
sys.modules[name] = importlib.util.module_from_spec(spec)
from gemma2_keras.kernels import native
assert native.library().gemma2_logits
"""


@pytest.mark.once
def test_two_processes_that_compile_at_once_both_have_the_library(anew):
    compiler()
    command = [sys.executable, "-c", COMPILING, kernels.__file__, os.path.dirname(kernels.__file__)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert len(names(anew)) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@given(words=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9))
@example(words=[0x7F7FFFFF, 0xFF7FFFFF, 0x80000000, 0])
@example(words=[0x7BFF0000, 0xFBFF0000])
@example(words=[0x7F800000])
@example(words=[0xFF800000])
@example(words=[0xFFFFFFFF])
def test_finite_is_what_numpy_finds_finite(dtype, words):
    narrow = np.dtype(dtype).itemsize == 2
    values = np.array([w >> 16 if narrow else w for w in words], "uint16" if narrow else "uint32").view(dtype)
    # Of some NaNs NumPy warns itself.
    with np.errstate(invalid="ignore"):
        assert kernels.is_finite(values) == bool(np.isfinite(values).all())


@pytest.mark.parametrize("place", [0, 2**19 - 1, 2**19, 2**20 + 6])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_one_number_among_many_is_found(place, wrong):
    values = np.ones((2**20 + 7, 1), ml_dtypes.bfloat16)
    assert kernels.is_finite(values)
    values[place] = wrong
    assert not kernels.is_finite(values)
