"""GGUF files of Gemma 2, which llama.cpp and Ollama run: written from any checkpoint, and read back exactly."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import gguf
import ml_dtypes
import numpy as np

from gemma2_keras.checkpoints.gguf_architecture import (
    ARCHITECTURE,
    REMAINDER,
    describe_architecture,
    parse_architecture,
)
from gemma2_keras.checkpoints.gguf_container import MAGIC, read_container
from gemma2_keras.checkpoints.gguf_tokenizer import MODELFILE_MARK, Vocabulary, find_stop_token_ids, sentencepiece_model
from gemma2_keras.checkpoints.guard import shown, some
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.checkpoints.saving import replacing_file
from gemma2_keras.config import Gemma2Config
from gemma2_keras.errors import CheckpointError

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
_NUMPY_DTYPES = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_DTYPE_OF_TYPE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
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
    """Write a GGUF file and, beside it, the `Modelfile` that Ollama needs.

    `GgufCheckpoint` reads the file back bit for bit, unless it is quantised. Tensors are converted one at a time, some
    rows at a time. Norms are float32 whatever `dtype` is, and where rows are no multiple of 32 numbers `"q8_0"` means
    float16, as in llama.cpp's converter.

    Args:
        path: of the file. A GGUF file there is replaced, and stays as it was if writing fails.
        checkpoint: the weights.
        proto: bytes of the SentencePiece model. Without it only programs that bring a tokenizer of their own can run
            the file, and there is no `Modelfile`.
        dtype: `"float32"`, `"float16"`, `"bfloat16"` or `"q8_0"`; `None` for the checkpoint's.
        stop_token_ids: `<eos>` and at most one more; `None` for `<eos>` and, where there is one, `<end_of_turn>`.
        name: what programs call the model; `None` for the name of the file.

    Raises:
        FileExistsError: if something else than a GGUF file stands at `path`, or another's `Modelfile` beside it.
        ValueError: if `dtype` is none of these, or cannot hold the weights; the vocabulary is none of Gemma's kind; or
            a hyperparameter is outside what the format holds.

    Warns:
        UserWarning: if `query_pre_attention_scalar` is not what Gemma 2 has at this size, since some programs cannot
            follow.

    Example:

    >>> import tempfile
    >>> from gemma2_keras import Gemma2Backbone
    >>> from gemma2_keras.checkpoints.contents import LiveCheckpoint
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
    if target.name.lower() == MODELFILE.lower() or not target.name.isprintable():
        raise ValueError(f"A GGUF file cannot be named {target.name!r}.")
    rows = checkpoint.config.vocabulary_size
    vocabulary = None if proto is None else Vocabulary(proto, rows, stop_token_ids)
    keys = describe_architecture(checkpoint.config)
    if vocabulary is None:
        with replacing_file(target, is_gguf, "a GGUF file") as beside:
            _write(beside, checkpoint, keys, None, dtype, target.stem if name is None else name)
        return
    with (
        replacing_file(target.with_name(MODELFILE), _is_our_modelfile, "a Modelfile of ours") as modelfile,
        replacing_file(target, is_gguf, "a GGUF file") as beside,
    ):
        modelfile.write_text(vocabulary.modelfile(target.name), encoding="utf-8")
        _write(beside, checkpoint, keys, vocabulary, dtype, target.stem if name is None else name)


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _is_our_modelfile(path: Path) -> bool:
    mark = MODELFILE_MARK.encode()
    with open(path, "rb") as file:
        return file.read(len(mark)) == mark


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
                remainder = _plus_one(checkpoint.read(name))[1]
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
                value = _plus_one(value)[0]
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
            np.ascontiguousarray(self._converted(rows)).tofile(file)

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
        dtype = _NUMPY_DTYPES[self._dtype]
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


def _plus_one(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A norm's weights as llama.cpp multiplies by them, and what rounding took away, so that nothing is lost.

    Source: Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    """
    weight = np.asarray(weight, np.float32)
    one = np.float32(1)
    total = one + weight
    with np.errstate(invalid="ignore"):
        counted = total - one
        remainder = (one - (total - counted)) + (weight - counted)
    # Where nothing was left of the weight it is kept as it is, since a sum knows no negative zero.
    remainder = np.where(total == one, weight, remainder)
    return total, np.where(np.isfinite(weight), remainder, np.float32(0))


def _minus_one(total: np.ndarray, remainder: np.ndarray) -> np.ndarray:
    """The weights whose `_plus_one` is given."""
    # In float64 the difference is exact wherever the remainder counts.
    weight = (total.astype(np.float64) - 1 + remainder).astype(np.float32)
    return np.where(total == 1, remainder, weight)


class GgufCheckpoint:
    """A GGUF file of a Gemma 2 text model, whole and as expected before any tensor is read.

    Args:
        path: of a file that `write_gguf` or llama.cpp's converter wrote, in float32, float16 or bfloat16.

    Attributes:
        config: the architecture. A file knows no dropout.

    Raises:
        CheckpointError: if the file is missing, truncated, broken, quantised or of another architecture; has a key that
            would change what is computed and is not implemented; or a tensor is missing, extra or misshapen.

    Example: see `write_gguf`.
    """

    mapped = True

    def __init__(self, path: str | os.PathLike) -> None:
        self._keys, self._tensors = read_container(path)
        self.config: Gemma2Config = parse_architecture(self._keys, {name: t.shape for name, t in self._tensors.items()})
        self._weights = weight_map(self.config)
        expected = {weight.gguf: weight.shape for weight in self._weights.values()}
        missing, extra = expected.keys() - self._tensors.keys(), self._tensors.keys() - expected.keys()
        if missing:
            raise CheckpointError(f"{path} lacks {len(missing)} tensors: {some(missing)}.")
        if extra:
            raise CheckpointError(f"{path} has {len(extra)} tensors that no Gemma 2 has: {some(extra)}.")
        for name, shape in expected.items():
            if self._tensors[name].shape != shape:
                raise CheckpointError(
                    f"Tensor {name!r} has shape {self._tensors[name].shape}; the keys of the file ask {shape}."
                )
        self._check_own_keys()

    def _check_own_keys(self) -> None:
        norms = {weight.gguf: weight.shape for weight in self._weights.values() if len(weight.shape) == 1}
        for key, value in self._keys.items():
            if key.startswith(REMAINDER):
                norm = key.removeprefix(REMAINDER)
                fits = isinstance(value, np.ndarray) and value.dtype == np.float32 and value.shape == norms.get(norm)
                if not fits or not np.isfinite(value).all():
                    raise CheckpointError(f"`{REMAINDER}…` is no float32 for each number of a norm: {shown(norm)}.")

    @property
    def dtype(self) -> str:
        """The dtype of the matrices; float32 where they differ."""
        types = {self._tensors[w.gguf].type for w in self._weights.values() if len(w.shape) == 2}
        return _DTYPE_OF_TYPE[types.pop()] if len(types) == 1 else "float32"

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text; none where the file does not say.

        Raises:
            CheckpointError: if one is outside the vocabulary.
        """
        return find_stop_token_ids(self._keys, self.config.vocabulary_size)

    def read(self, name: str) -> np.ndarray:
        """One tensor; a matrix as a view of the file, a norm's weights in the checkpoint's dtype.

        Raises:
            CheckpointError: if that dtype cannot hold a norm's weights, which files have in float32.
        """
        weight = self._weights[name]
        tensor = self._tensors[weight.gguf]
        dtype = _NUMPY_DTYPES[_DTYPE_OF_TYPE[tensor.type]]
        # BF16 is read as its bits.
        value = tensor.values.view(dtype)
        if len(weight.shape) == 2:
            return value
        remainder = self._keys.get(REMAINDER + weight.gguf, np.zeros(weight.shape, np.float32))
        with np.errstate(over="ignore"):
            norm = _minus_one(value.astype(np.float32), remainder).astype(_NUMPY_DTYPES[self.dtype])
        if (np.isinf(norm) & np.isfinite(value)).any():
            raise CheckpointError(f"Tensor {weight.gguf!r} has numbers that {self.dtype} cannot hold.")
        return norm

    def tokenizer_proto(self) -> bytes | None:
        """A SentencePiece model that gives the file's token ids, for `Gemma2Tokenizer`; `None` if it has no tokenizer.

        Raises:
            CheckpointError: if the tokenizer is of another kind than Gemma's, or broken.
        """
        return sentencepiece_model(self._keys, self.config.vocabulary_size)
