"""The CPU kernels of `native.cpp`: compiled once on this machine by its C++ compiler, called through ctypes.

Where there is no compiler everything works without them, at the speed of the portable operations.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-pthread", "-ffp-contract=fast", "-fno-math-errno")
_HEADERS = ("attention.h", "decode.h", "elementwise.h", "expectation.h", "team.h", "tiles.h", "vectors.h")
_COMPILE_SECONDS = 120
# Of DLPack's device types.
_CPU = 1

_Pointer, _Long, _Double, _Int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int


class Linear(ctypes.Structure):
    """One projection: addresses of its (out, in) weight and of its adapter, if any."""

    _fields_ = (
        *((name, _Pointer) for name in ("weight", "a", "b", "factors")),
        *((name, _Long) for name in ("out", "inputs", "rank")),
        ("scale", _Double),
    )


class Layer(ctypes.Structure):
    """One decoder block, with its part of the cache."""

    _fields_ = (
        ("norms", _Pointer * 4),
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _Pointer) for name in ("keys", "values")),
        *((name, _Long) for name in ("slots", "window")),
    )


class Model(ctypes.Structure):
    """All that a decoding step reads."""

    _fields_ = (
        *((name, _Long) for name in ("layers", "width", "heads", "key_heads", "head_dim", "hidden", "vocabulary")),
        *((name, _Long) for name in ("weights_bfloat16", "cache_bfloat16")),
        *((name, _Double) for name in ("scale", "cap", "final_cap", "epsilon", "embedding_scale")),
        *((name, _Pointer) for name in ("frequencies", "embedding", "final_norm")),
        ("layer", ctypes.POINTER(Layer)),
    )


_MODEL = ctypes.POINTER(Model)
_SIGNATURES: dict[str, tuple[Any, tuple]] = {
    "gemma2_decode": (_Long, (_MODEL, _Long, _Long, _Int, *[_Pointer] * 5, _Long, *[_Pointer] * 2)),
    "gemma2_logits": (None, (_MODEL, _Long, _Int, _Pointer, _Pointer)),
    "gemma2_attend": (None, (_Long, *[_Pointer] * 6, *[_Long] * 6, _Double, _Double, _Int)),
    "gemma2_attend_gradient": (None, (_Long, *[_Pointer] * 10, *[_Long] * 6, _Double, _Double, _Int)),
    "gemma2_expectation": (None, (_Long, *[_Pointer] * 2, *[_Long] * 3, _Double, _Int, *[_Pointer] * 3)),
    "gemma2_share_threads": (None, (_Pointer,)),
    "gemma2_rms_norm": (None, (*[_Long] * 2, *[_Pointer] * 3, *[_Long] * 2, _Double, _Int)),
    "gemma2_gated_gelu": (None, (_Long, *[_Pointer] * 3, _Long, _Int)),
    "gemma2_rotate": (None, (_Long, *[_Pointer] * 4, *[_Long] * 3, _Int)),
    "gemma2_use_huge_pages": (None, (_Pointer, _Long)),
}


@functools.cache
def library() -> Any:
    """The kernels as a `ctypes` library; `None` where they cannot be compiled."""
    found = compiled("native.cpp")
    if found is not None:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(found, name)
            function.restype, function.argtypes = result, arguments
    return found


def compiled(source: str, include: str | None = None) -> Any:
    """A `ctypes` library of one of our C++ files; `None` where it cannot be compiled.

    Args:
        source: its name.
        include: a folder of headers of others, which a new version of theirs gives another name or other contents.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("clang++") or ""]
    if not compiler[0] or os.name != "posix":
        return None
    try:
        with _cache_folder() as folder:
            return ctypes.CDLL(str(_compiled(compiler, Path(folder), source, include)))
    except (OSError, subprocess.SubprocessError):
        return None


def expectation(states: Any, table: Any, cap: float | None, gradient: bool) -> tuple[Any, Any, Any]:
    """What the softmax of `soft_cap(states table^T, cap)` says of each state, by the CPU kernel.

    Args:
        states: (M, D) float32 array in one piece.
        table: (V, D) float32 array in one piece.
        cap: soft cap on the logits; `None` for none.
        gradient: whether the gradient is made along.

    Returns:
        normaliser: (M,) float32, the log of the sum of the exponentials of the logits.
        first: (M,) int32, the likeliest words.
        expected: (M, D) float32, the gradient of `normaliser` with respect to the states; (0, D) if not asked for.
    """
    count, width = states.shape
    normaliser, first = np.empty(count, "float32"), np.empty(count, "int32")
    expected = np.empty((count if gradient else 0, width), "float32")
    library().gemma2_expectation(
        False,
        *(states.ctypes.data, table.ctypes.data, count, width, len(table), cap or 0.0, threads()),
        *(normaliser.ctypes.data, first.ctypes.data, expected.ctypes.data if gradient else None),
    )
    return normaliser, first, expected


def threads() -> int:
    """How many threads the kernels use: `OMP_NUM_THREADS`, as other libraries, or the processors we may run on."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_on_cpu(tensor: Any) -> bool:
    """Whether a tensor of any backend lies in the CPU's memory."""
    try:
        return tensor.__dlpack_device__()[0] == _CPU
    except (BufferError, RuntimeError, TypeError, ValueError):
        # An array that is spread over several devices lies in no single memory.
        return False


def address(tensor: Any) -> tuple[int, Any]:
    """Where a tensor of any backend lies in the CPU's memory, without a copy.

    Returns:
        The address, and an object to keep for as long as the address is used.

    Raises:
        ValueError: if the tensor is not in the CPU's memory, or not in one piece.
    """
    if not is_on_cpu(tensor):
        raise ValueError("The tensor is not in the CPU's memory.")
    capsule = tensor.__dlpack__()
    managed = ctypes.cast(_capsule_pointer(capsule, b"dltensor"), ctypes.POINTER(_DLTensor)).contents
    expected = 1
    for size, stride in reversed(list(zip(*_shape_and_strides(managed), strict=True))):
        if size != 1 and stride != expected:
            raise ValueError("The tensor does not lie in one piece.")
        expected *= size
    return managed.data + managed.byte_offset, (tensor, capsule)


class _DLTensor(ctypes.Structure):
    """The first part of a DLPack `DLManagedTensor` (https://dmlc.github.io/dlpack/latest/c_api.html)."""

    _fields_ = (
        ("data", _Pointer),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(_Long)),
        ("strides", ctypes.POINTER(_Long)),
        ("byte_offset", ctypes.c_uint64),
    )


def _shape_and_strides(tensor: _DLTensor) -> tuple[list[int], list[int]]:
    shape = [tensor.shape[i] for i in range(tensor.ndim)]
    if tensor.strides:
        return shape, [tensor.strides[i] for i in range(tensor.ndim)]
    strides = [1] * len(shape)
    for i in reversed(range(len(shape) - 1)):
        strides[i] = strides[i + 1] * shape[i + 1]
    return shape, strides


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = _Pointer, (ctypes.py_object, ctypes.c_char_p)


def _compiled(compiler: list[str], cache: Path, source: str, include: str | None) -> Path:
    """The library's file in a folder, compiled unless an earlier run on such a machine did."""
    folder = resources.files("gemma2_keras.kernels")
    sources = {name: folder.joinpath(name).read_bytes() for name in (source, *_HEADERS)}
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=_COMPILE_SECONDS).stdout
    flags = _FLAGS if include is None else (*_FLAGS, "-isystem", include)
    theirs = [] if include is None else [path.read_bytes() for path in sorted(Path(include).rglob("*.h"))]
    parts = [*sources.values(), *theirs, version, " ".join(flags).encode(), _processor().encode()]
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()
    target = cache / f"{Path(source).stem}-{key[:20]}.so"
    if not target.exists():
        # Written beside and renamed: whoever compiles at the same time sees a whole file or none.
        with tempfile.TemporaryDirectory(dir=cache) as beside:
            for name, text in sources.items():
                Path(beside, name).write_bytes(text)
            built = Path(beside, "built.so")
            command = [*compiler, *flags, str(Path(beside, source)), "-o", str(built)]
            subprocess.run(command, capture_output=True, check=True, timeout=_COMPILE_SECONDS)
            built.rename(target)
    return target


def _cache_folder() -> contextlib.AbstractContextManager[str]:
    """A folder that only this user can write to, since code is loaded from it; where there is none, a passing one."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(home, "gemma2_keras")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK) and not folder.stat().st_mode & 0o022:
            return contextlib.nullcontext(str(folder))
    except OSError:
        pass
    return tempfile.TemporaryDirectory(prefix="gemma2_keras-")


def _processor() -> str:
    """What tells this kind of processor from others, since code is compiled for the one at hand."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith(("flags", "Features", "model name", "isa"))]
        return "".join(sorted(set(lines)))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
