"""GGUF files of Gemma 2, which llama.cpp and Ollama run: written from any checkpoint, and read back exactly."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import gguf
import numpy as np

from gemma2_keras.checkpoints.gguf.architecture import (
    ARCHITECTURE,
    REMAINDER,
    describe_architecture,
)
from gemma2_keras.checkpoints.gguf.container import NUMPY_DTYPES, is_gguf
from gemma2_keras.checkpoints.gguf.norms import plus_one
from gemma2_keras.checkpoints.gguf.tokenizer import MODELFILE_MARK, Vocabulary
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.checkpoints.saving import replacing_file

if TYPE_CHECKING:
    from gemma2_keras.checkpoints.contents import Checkpoint

MODELFILE = "Modelfile"
DTYPES = ("float32", "float16", "bfloat16", "q8_0")

_TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
# Columns that are quantised together; and how many numbers are converted at a time.
_Q8_BLOCK, _AT_A_TIME = 32, 2**21
_LARGEST_FLOAT16 = 65504.0


def write_gguf(
    path: str | os.PathLike,
    checkpoint: Checkpoint,
    proto: bytes | None = None,
    *,
    dtype: str | None = None,
    stop_token_ids: Sequence[int] | None = None,
    name: str | None = None,
) -> None:
    """Write a GGUF file and, beside it, the file that Ollama needs: `modelfile_of` says where.

    `GgufCheckpoint` reads the file back bit for bit, unless it is quantised. Tensors are converted one at a time, some
    rows at a time. Norms are float32 whatever `dtype` is, and where rows are no multiple of 32 numbers `"q8_0"` means
    float16, as in llama.cpp's converter.

    Args:
        path: of the file. A GGUF file there is replaced, and stays as it was if writing fails.
        checkpoint: the weights.
        proto: bytes of the SentencePiece model. Without it only programs that bring a tokenizer of their own can run
            the file, and there is no file for Ollama.
        dtype: `"float32"`, `"float16"`, `"bfloat16"` or `"q8_0"`; `None` for the checkpoint's.
        stop_token_ids: `<eos>` and at most one more; `None` for `<eos>` and, where there is one, `<end_of_turn>`.
        name: what programs call the model; `None` for the name of the file.

    Raises:
        FileExistsError: if something else than a GGUF file stands at `path`, or than a file of ours where that for
            Ollama goes.
        ValueError: if `dtype` is none of these, or cannot hold the weights; the vocabulary is none of Gemma's kind; or
            a hyperparameter is outside what the format holds.

    Warns:
        UserWarning: if `query_pre_attention_scalar` is not what Gemma 2 has at this size, since some programs cannot
            follow.

    Example:

    >>> import tempfile
    >>> from gemma2_keras import Gemma2Backbone
    >>> from gemma2_keras.checkpoints.contents import LiveCheckpoint
    >>> from gemma2_keras.checkpoints.gguf.reading import GgufCheckpoint
    >>> backbone = Gemma2Backbone(64, 1, 4, 2, 24, 40, 8)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_gguf(f"{folder}/small.gguf", LiveCheckpoint(backbone), dtype="bfloat16")
    ...     GgufCheckpoint(f"{folder}/small.gguf").dtype
    'bfloat16'
    """
    dtype = checkpoint.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, or None; given {dtype!r}.")
    if proto is None and stop_token_ids is not None:
        raise ValueError("`stop_token_ids` need `proto`, the vocabulary whose ids they are.")
    target = Path(os.path.abspath(path))
    if target.name.lower() in ("", MODELFILE.lower()) or not target.name.isprintable():
        raise ValueError(f"A GGUF file cannot be named {target.name!r}.")
    rows = checkpoint.config.vocabulary_size
    vocabulary = None if proto is None else Vocabulary(proto, rows, stop_token_ids)
    keys = describe_architecture(checkpoint.config)
    if vocabulary is None:
        with replacing_file(target, is_gguf, "a GGUF file") as beside:
            _write(beside, checkpoint, keys, None, dtype, target.stem if name is None else name)
        return
    with (
        replacing_file(modelfile_of(target), _is_our_modelfile, "a Modelfile of ours") as modelfile,
        replacing_file(target, is_gguf, "a GGUF file") as beside,
    ):
        modelfile.write_text(vocabulary.modelfile(target.name), encoding="utf-8")
        _write(beside, checkpoint, keys, vocabulary, dtype, target.stem if name is None else name)


def modelfile_of(path: Path) -> Path:
    """Where the file goes that tells Ollama how to run a GGUF file: `Modelfile` beside it, or `NAME.Modelfile` where
    another model has that.

    >>> modelfile_of(Path("nowhere/cat.gguf")).name
    'Modelfile'
    """
    usual = path.with_name(MODELFILE)
    free = not usual.exists() or usual.stat().st_size == 0
    return usual if free or _is_our_modelfile(usual, path.name) else path.with_name(f"{path.stem}.{MODELFILE}")


def _is_our_modelfile(path: Path, name: str = "") -> bool:
    """Whether we wrote a file for Ollama, and of the GGUF file of that name, if one is given."""
    begin = MODELFILE_MARK + (f"\nFROM ./{name}\n" if name else "")
    with open(path, "rb") as file:
        return file.read(len(begin.encode())) == begin.encode()


def _write(
    path: Path,
    checkpoint: Checkpoint,
    keys: Mapping[str, np.generic],
    vocabulary: Vocabulary | None,
    dtype: str,
    title: str,
) -> None:
    weights = weight_map(checkpoint.config)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(title)
        writer.add_file_type(_FILE_TYPES[dtype])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add = {"uint32": writer.add_uint32, "float32": writer.add_float32, "float64": writer.add_float64}
        for key, value in keys.items():
            add[value.dtype.name](key, value.item())
        if vocabulary is None:
            writer.add_tokenizer_model("none")
            writer.add_vocab_size(checkpoint.config.vocabulary_size)
        else:
            vocabulary.write(writer)
        dtypes = {}
        for name, weight in weights.items():
            if len(weight.shape) == 1:
                remainder = plus_one(checkpoint.read(name))[1]
                if remainder.view(np.uint32).any():
                    writer.add_array(REMAINDER + weight.gguf, remainder.tolist())
            dtypes[name] = _dtype_within(dtype, weight.shape)
            size = _bytes(weight.shape, dtypes[name])
            writer.add_tensor_info(weight.gguf, weight.shape, np.dtype("f4"), size, _TYPES[dtypes[name]])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in weights.items():
            value = checkpoint.read(name)
            if len(weight.shape) == 1:
                value = plus_one(value)[0]
            # The writer asks for no more than the size, and then to be written.
            writer.write_tensor_data(cast(np.ndarray, _Streamed(name, value, dtypes[name])))
    finally:
        writer.close()


def _dtype_within(dtype: str, shape: tuple[int, ...]) -> str:
    """The dtype of one tensor in a file of a dtype."""
    if len(shape) == 1:
        return "float32"
    return "float16" if dtype == "q8_0" and shape[-1] % _Q8_BLOCK else dtype


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    size, per_size = gguf.GGML_QUANT_SIZES[_TYPES[dtype]]
    return math.prod(shape) // size * per_size


class _Streamed:
    """A tensor that is converted while it is written."""

    def __init__(self, name: str, value: np.ndarray, dtype: str) -> None:
        self._name, self._value, self._dtype = name, value, dtype
        self.nbytes = _bytes(value.shape, dtype)

    def tofile(self, file: BinaryIO) -> None:
        """Write the tensor, in the order of its rows."""
        for rows in self._some_rows():
            file.write(np.ascontiguousarray(self._converted(rows)).view(np.uint8).data)

    def _some_rows(self) -> Iterator[np.ndarray]:
        value = np.atleast_2d(self._value)
        count = max(1, _AT_A_TIME // value.shape[1])
        for start in range(0, len(value), count):
            yield value[start : start + count]

    def _converted(self, rows: np.ndarray) -> np.ndarray:
        if self._dtype == "q8_0":
            rows = np.ascontiguousarray(rows, np.float32)
            # A block is kept as float16 times whole numbers up to 127.
            if not (np.abs(rows) <= 127 * _LARGEST_FLOAT16).all():
                raise self._beyond()
            return gguf.quants.quantize(rows, _TYPES["q8_0"])
        dtype = NUMPY_DTYPES[self._dtype]
        if rows.dtype == dtype:
            return rows
        with np.errstate(over="ignore"):
            converted = rows.astype(dtype)
        if (np.isinf(converted) & ~np.isinf(rows)).any():
            raise self._beyond()
        return converted

    def _beyond(self) -> ValueError:
        return ValueError(
            f"{self._name!r} has numbers that {self._dtype} cannot hold; choose `dtype` bfloat16 or float32."
        )
