from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import tracemalloc
import warnings
from pathlib import Path

import gguf
import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gemma2_keras import Gemma2Config
from gemma2_keras.checkpoints.contents import LiveCheckpoint
from gemma2_keras.checkpoints.gguf import norms, writing
from gemma2_keras.checkpoints.gguf.container import read_container
from gemma2_keras.checkpoints.gguf.reading import GgufCheckpoint
from gemma2_keras.checkpoints.gguf.writing import write_gguf
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.errors import CheckpointError
from tests.checkpoints.gguf import raw
from tests.preprocessing import tiny

REPOSITORY = Path(__file__).resolve().parents[3]
# Width ≠ heads · head size, no width is a multiple of 32, an odd vocabulary and number of layers.
ODD = Gemma2Config(
    vocabulary_size=97,
    num_layers=3,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=24,
    intermediate_dim=41,
    head_dim=10,
    sliding_window_size=6,
    context_length=96,
)
CONFIGS = {
    "odd": ODD,
    # Numbers that are no float32, a scalar that is not the head size, and no caps.
    "numbers": Gemma2Config(
        **{
            **ODD.to_dict(),
            "query_pre_attention_scalar": 17.123456789,
            "attention_logit_soft_cap": None,
            "final_logit_soft_cap": None,
            "layer_norm_epsilon": 1.23456789012e-6,
            "rope_max_wavelength": 12345.678901234,
        }
    ),
    # As many layers as the 27B model: there the scalar is width / heads.
    "27B": Gemma2Config(5, 46, 3, 1, 20, 7, 4, query_pre_attention_scalar=6, attention_logit_soft_cap=2.0**64),
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


class Held:
    """A checkpoint of random numbers, with norms that adding 1 rounds."""

    def __init__(self, config: Gemma2Config, dtype: str = "float32", seed: int = 0) -> None:
        self.config, self.dtype = config, dtype
        draw = np.random.default_rng(seed)
        self.tensors = {}
        for name, weight in weight_map(config).items():
            value = draw.normal(0, 1, weight.shape)
            if len(weight.shape) == 1:
                value *= 10.0 ** draw.integers(-12, 3, weight.shape)
                value[:2] = 0.0, -0.0
            self.tensors[name] = value.astype(DTYPES[dtype])

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]


def write(path, checkpoint, proto=None, **options) -> None:
    """Writes a file, whatever some programs make of its scalar."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`query_pre_attention_scalar` is")
        write_gguf(path, checkpoint, proto, **options)


def types(path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


# Out and in


@pytest.mark.once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_written_is_read_bit_for_bit(tmp_path, config, dtype):
    held = Held(config, dtype)
    write(tmp_path / "x.gguf", held)
    checkpoint = GgufCheckpoint(tmp_path / "x.gguf")
    assert checkpoint.config == config
    assert checkpoint.dtype == dtype
    for name, value in held.tensors.items():
        found = checkpoint.read(name)
        assert found.dtype == value.dtype
        assert found.shape == value.shape
        assert found.tobytes() == value.tobytes(), name
    # And once more, from the file.
    write(tmp_path / "y.gguf", checkpoint, name="x")
    assert (tmp_path / "y.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_in_memory_goes_out_and_in_bit_for_bit(tmp_path, dtype):
    model = tiny.causal_lm(dtype=dtype, num_layers=2)
    model.enable_lora(2, targets=["q_proj", "down_proj"])
    draw = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(draw.normal(0, 0.3, weight.shape).astype(keras.backend.standardize_dtype(weight.dtype)))
    live = LiveCheckpoint(model.backbone)
    proto = model.preprocessor.tokenizer.proto
    write(tmp_path / "x.gguf", live, proto)
    checkpoint = GgufCheckpoint(tmp_path / "x.gguf")
    assert checkpoint.config == model.backbone.config
    assert checkpoint.stop_token_ids == (1, 107)
    assert checkpoint.dtype == dtype
    for name in weight_map(checkpoint.config):
        np.testing.assert_array_equal(checkpoint.read(name), live.read(name))


@pytest.mark.once
def test_matrices_are_views_of_the_file_and_writing_to_them_does_not_reach_it(tmp_path):
    write(tmp_path / "x.gguf", Held(ODD, "bfloat16"))
    checkpoint = GgufCheckpoint(tmp_path / "x.gguf")
    value = checkpoint.read("model.embed_tokens.weight")
    before = (tmp_path / "x.gguf").read_bytes()
    assert not value.flags.owndata
    value[...] = 0
    assert (tmp_path / "x.gguf").read_bytes() == before


@pytest.mark.once
@given(arrays(np.uint32, 8, elements=st.integers(0, 2**32 - 1)))
@example(np.array([0, 1 << 31, 1, (1 << 31) + 1, 0x3F800000, 0xBF800000, 0x7F7FFFFF, 0xFF7FFFFF], np.uint32))
@example(np.array([0x33800000, 0x33800001, 0xB3000000, 0xB3000001, 0x4B800000, 0x4B800001, 0x5A000000, 1 << 22]))
def test_a_norm_comes_back_bit_for_bit(bits):
    weight = bits.astype(np.uint32).view(np.float32)
    total, remainder = norms.plus_one(weight)
    with np.errstate(all="ignore"):
        expected = np.float32(1) + weight
    np.testing.assert_array_equal(total, expected)
    restored = norms.minus_one(total, remainder)
    finite = np.isfinite(weight)
    assert restored.dtype == np.float32
    assert restored[finite].tobytes() == weight[finite].tobytes()
    np.testing.assert_array_equal(restored, weight)


@pytest.mark.once
def test_only_norms_that_rounding_changed_have_a_key_more(tmp_path):
    held = Held(ODD)
    for name, value in held.tensors.items():
        if value.ndim == 1:
            held.tensors[name] = np.round(value).astype("float32") + np.float32(0)
    held.tensors["model.norm.weight"][3] = 1e-9
    write(tmp_path / "x.gguf", held)
    keys = read_container(tmp_path / "x.gguf").keys
    assert [key for key in keys if key.startswith("gemma2_keras.")] == ["gemma2_keras.remainder.output_norm.weight"]


# What is in the file


@pytest.mark.once
def test_the_keys_are_those_of_llama_cpp(tmp_path):
    write(tmp_path / "small.gguf", Held(ODD, "float16"))
    keys = read_container(tmp_path / "small.gguf").keys
    assert {key: value for key, value in keys.items() if not key.startswith("gemma2_keras.")} == {
        "general.architecture": "gemma2",
        "general.type": "model",
        "general.name": "small",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "gemma2.context_length": 96,
        "gemma2.embedding_length": 24,
        "gemma2.block_count": 3,
        "gemma2.feed_forward_length": 41,
        "gemma2.attention.head_count": 4,
        "gemma2.attention.head_count_kv": 2,
        "gemma2.attention.key_length": 10,
        "gemma2.attention.value_length": 10,
        "gemma2.attention.sliding_window": 6,
        "gemma2.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "gemma2.attn_logit_softcapping": 50.0,
        "gemma2.final_logit_softcapping": 30.0,
        "gemma2.rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "none",
        "gemma2.vocab_size": 97,
    }


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_the_library_of_the_format_reads_the_same(tmp_path, dtype):
    held = Held(Gemma2Config(**{**ODD.to_dict(), "hidden_dim": 64}))
    write(tmp_path / "x.gguf", held, name="A model", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["general.name"].contents() == "A model"
    if dtype != "q8_0":
        for key, value in read_container(tmp_path / "x.gguf").keys.items():
            np.testing.assert_array_equal(reader.fields[key].contents(), value)
    names = {weight.gguf: name for name, weight in weight_map(held.config).items()}
    assert [tensor.name for tensor in reader.tensors] == list(names)
    kinds = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
    for tensor in reader.tensors:
        expected = held.tensors[names[tensor.name]]
        if expected.ndim == 1:
            assert tensor.tensor_type.name == "F32"
            np.testing.assert_array_equal(tensor.data, 1 + expected)
            continue
        found = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        # Rows of 41 and of 40 numbers are no whole blocks.
        kind = "F16" if dtype == "q8_0" and expected.shape[1] % 32 else kinds[dtype]
        assert tensor.tensor_type.name == kind
        if kind == "Q8_0":
            blocks = np.abs(expected).reshape(len(expected), -1, 32).max(-1)
            # Half a step, and a step that is itself rounded to float16.
            largest = np.repeat(blocks / 127 * (0.5 + 127 * 2**-11), 32, axis=1)
            assert (np.abs(found - expected) <= largest).all()
            np.testing.assert_array_equal(tensor.data, gguf.quantize(expected, tensor.tensor_type))
        else:
            name = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[kind]
            np.testing.assert_array_equal(found, expected.astype(DTYPES[name]).astype("float32"))


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_however_many_rows_are_converted_at_a_time_the_file_is_the_same(tmp_path, monkeypatch, dtype):
    held = Held(Gemma2Config(**{**ODD.to_dict(), "hidden_dim": 64}))
    write(tmp_path / "x.gguf", held, dtype=dtype)
    monkeypatch.setattr(writing, "_AT_A_TIME", 200)
    write(tmp_path / "y.gguf", held, dtype=dtype, name="x")
    assert (tmp_path / "y.gguf").read_bytes() == (tmp_path / "x.gguf").read_bytes()


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_a_large_table_is_never_in_memory(tmp_path, dtype):
    config = Gemma2Config(64_000, 1, 2, 1, 256, 8, 4)

    class Thin(Held):
        def read(self, name):
            # As large as they should be, and of one number.
            return np.broadcast_to(np.float32(0.5), weight_map(config)[name].shape)

    thin = Thin(ODD)
    thin.config = config
    tracemalloc.start()
    try:
        write(tmp_path / "x.gguf", thin, dtype=dtype)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (64_000 * 256 * 4) // 2
    assert (tmp_path / "x.gguf").stat().st_size > 64_000 * 256


@pytest.mark.once
def test_a_scalar_that_gguf_has_no_key_for_is_warned_of(tmp_path):
    message = r"`query_pre_attention_scalar` is 17.1.* programs take 10 .* gemma2.rope.scaling.attn_factor makes up for"
    with pytest.warns(UserWarning, match=message) as caught:
        write_gguf(tmp_path / "x.gguf", Held(CONFIGS["numbers"]))
    assert caught[0].filename == __file__
    factor = read_container(tmp_path / "x.gguf").keys["gemma2.rope.scaling.attn_factor"]
    # Scores are multiplied by its square and by 10 ** -0.5.
    assert factor**2 * 10**-0.5 == pytest.approx(17.123456789**-0.5, rel=1e-6)


@pytest.mark.once
def test_without_caps_llama_cpp_has_caps_that_change_nothing(tmp_path):
    write(tmp_path / "x.gguf", Held(CONFIGS["numbers"]))
    keys = read_container(tmp_path / "x.gguf").keys
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = keys[f"gemma2.{name}"]
        scores = np.random.default_rng(0).normal(0, 1e4, 1000).astype("float32")
        np.testing.assert_array_equal(cap * np.tanh(scores / cap), scores)


# What cannot be written


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window_size": 2**31}, r"`sliding_window_size` must be below 2\*\*31 in a GGUF file"),
        ({"layer_norm_epsilon": 1e-60}, "`layer_norm_epsilon` is 1e-60, beyond float32"),
        ({"rope_max_wavelength": 1e60}, "`rope_max_wavelength` is 1e[+]60, beyond float32"),
        ({"query_pre_attention_scalar": 1e-300}, "`query_pre_attention_scalar` is 1e-300, which no GGUF file can hold"),
    ],
)
def test_numbers_that_the_format_cannot_hold(tmp_path, changes, message):
    held = Held(ODD)
    held.config = Gemma2Config(**{**ODD.to_dict(), **changes})
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "x.gguf", held)
    assert not list(tmp_path.iterdir())


@pytest.mark.once
@pytest.mark.parametrize(
    ("dtype", "number"), [("float16", 65520.0), ("float16", -1e30), ("q8_0", 9e6), ("q8_0", np.nan)]
)
def test_weights_that_the_dtype_cannot_hold_leave_the_old_file(tmp_path, dtype, number):
    held = Held(Gemma2Config(**{**ODD.to_dict(), "hidden_dim": 32}))
    write(tmp_path / "x.gguf", held)
    old = (tmp_path / "x.gguf").read_bytes()
    held.tensors["model.layers.1.mlp.up_proj.weight"][7, 7] = number
    with pytest.raises(
        ValueError, match=rf"up_proj.weight' has numbers that {dtype} cannot hold; choose `dtype` bfloat"
    ):
        write(tmp_path / "x.gguf", held, dtype=dtype)
    assert (tmp_path / "x.gguf").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("x.gguf", {"dtype": "int8"}, "`dtype` must be one of float32, float16, bfloat16, q8_0, or None; given 'int8'"),
        ("x.gguf", {"stop_token_ids": [1]}, "`stop_token_ids` need `proto`"),
        ("/", {}, "A GGUF file cannot be named ''"),
        ("Modelfile", {}, "A GGUF file cannot be named 'Modelfile'"),
        ("a\nb.gguf", {}, r"A GGUF file cannot be named 'a\\nb.gguf'"),
    ],
)
def test_options_that_mean_nothing(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / name, Held(ODD), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.once
def test_what_is_no_gguf_file_is_not_replaced(tmp_path):
    (tmp_path / "x.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match=r"x.gguf exists and is not a GGUF file: choose another path"):
        write_gguf(tmp_path / "x.gguf", Held(ODD))
    assert (tmp_path / "x.gguf").read_text() == "mine"


@pytest.mark.once
def test_anothers_modelfile_is_not_replaced(tmp_path):
    (tmp_path / "Modelfile").write_text("FROM llama3\n")
    (tmp_path / "y.Modelfile").write_text("mine")
    write(tmp_path / "x.gguf", Held(tiny.backbone().config), tiny.proto())
    assert "FROM ./x.gguf\n" in (tmp_path / "x.Modelfile").read_text()
    with pytest.raises(FileExistsError, match=r"y\.Modelfile exists and is not a Modelfile of ours"):
        write(tmp_path / "y.gguf", Held(tiny.backbone().config), tiny.proto())
    assert (tmp_path / "Modelfile").read_text() == "FROM llama3\n"
    assert (tmp_path / "y.Modelfile").read_text() == "mine"
    assert not (tmp_path / "y.gguf").exists()


@pytest.mark.once
def test_each_file_has_a_modelfile(tmp_path):
    held = Held(tiny.backbone().config)
    files = {"first.gguf": "Modelfile", "second file.gguf": "second file.Modelfile"}
    for name, modelfile in (*files.items(), *files.items()):
        write(tmp_path / name, held, tiny.proto())
        text = (tmp_path / modelfile).read_text()
        assert text.startswith(
            f"# Written by gemma2-keras together with the GGUF file below, and replaced with it.\nFROM ./{name}\n"
        )
    assert 'TEMPLATE """<start_of_turn>user\n{{ if .System }}' in text
    assert text.endswith('"""\nPARAMETER stop "<end_of_turn>"\n')
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.once
def test_a_killed_writer_leaves_the_old_file(tmp_path):
    script = f"""
        import os
        import numpy as np
        from gemma2_keras.checkpoints.gguf.writing import write_gguf
        from gemma2_keras.checkpoints.names import weight_map
        from gemma2_keras.config import Gemma2Config

        class Dying:
            config, dtype = Gemma2Config(97, 3, 4, 2, 24, 41, 10), "float32"

            def read(self, name):
                if name == "model.layers.1.mlp.up_proj.weight":
                    os._exit(9)
                return np.ones(weight_map(self.config)[name].shape, "float32")

        write_gguf({str(tmp_path / "x.gguf")!r}, Dying())
    """
    write(tmp_path / "x.gguf", Held(ODD, seed=1))
    old = (tmp_path / "x.gguf").read_bytes()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=REPOSITORY, timeout=120)
    assert done.returncode == 9
    assert (tmp_path / "x.gguf").read_bytes() == old
    left = [path for path in tmp_path.iterdir() if path.name != "x.gguf"]
    assert len(left) == 1
    assert left[0].stat().st_size > 1000
    # The next one clears up.
    write(tmp_path / "x.gguf", Held(ODD))
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    assert (tmp_path / "x.gguf").read_bytes() != old


# Files from elsewhere


@pytest.fixture
def refused(tmp_path):
    def check(message: str, keys=None, tensors=None) -> None:
        path = tmp_path / "x.gguf"
        path.write_bytes(
            raw.whole(
                raw.smallest_keys() if keys is None else keys, raw.smallest_tensors() if tensors is None else tensors
            )
        )
        with pytest.raises(CheckpointError, match=message) as caught:
            GgufCheckpoint(path)
        assert len(str(caught.value)) < 600 + len(str(path))

    return check


def changed(**changes) -> list:
    """The smallest file's keys, changed: a type and a value, or `...` for none."""
    keys = {key: (kind, value) for key, kind, value in raw.smallest_keys()}
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    return [(key, *value) for key, value in keys.items() if value is not ...]


@pytest.mark.once
def test_the_smallest_file_is_read(tmp_path):
    (tmp_path / "x.gguf").write_bytes(raw.whole(raw.smallest_keys(), raw.smallest_tensors()))
    checkpoint = GgufCheckpoint(tmp_path / "x.gguf")
    assert checkpoint.config == Gemma2Config(7, 1, 2, 1, 6, 5, 4, sliding_window_size=3, context_length=16)
    assert checkpoint.dtype == "float32"
    assert checkpoint.tokenizer_proto() is None
    assert checkpoint.stop_token_ids == ()
    np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), np.full(6, -1, "float32"))


U32, F32, STRING, BOOL, ARRAY, F64 = raw.U32, raw.F32, raw.STRING, raw.BOOL, raw.ARRAY, raw.F64


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__architecture": (STRING, "llama")}, "`general.architecture` is 'llama'; only \"gemma2\" is read"),
        ({"general__architecture": (STRING, "x" * 9999)}, "`general.architecture` is 'x+…; only"),
        ({"general__architecture": (U32, 2)}, "`general.architecture` is 2; only"),
        ({"general__architecture": ...}, "`general.architecture` is None; only"),
        ({"general__type": (STRING, "adapter")}, "`general.type` is 'adapter'; only \"model\" is read"),
        *(
            ({f"gemma2__{key}": value}, f"`gemma2.{key.replace('__', '.')}` is .*; it must be a whole number above 0")
            for key in ("context_length", "block_count", "attention__head_count", "attention__key_length")
            for value in (..., (U32, 0), (raw.I32, -1), (F32, 4.0), (BOOL, True), (STRING, "4"), (ARRAY, (U32, [4])))
        ),
        ({"gemma2__attention__sliding_window": (U32, 0)}, "sliding_window` is 0; it must be a whole number above 0"),
        *(
            ({f"gemma2__{key}": value}, f"`gemma2.{key.replace('__', '.')}` is .*; it must be a float32 above 0")
            for key in ("attention__layer_norm_rms_epsilon", "final_logit_softcapping", "rope__freq_base")
            for value in ((F32, 0.0), (F32, -1.0), (F32, np.nan), (F32, np.inf), (F64, 1.0), (U32, 1), (STRING, "1"))
        ),
        ({"gemma2__attention__layer_norm_rms_epsilon": ...}, "layer_norm_rms_epsilon` is None; it must be"),
        ({"gemma2__block_count": (U32, 2)}, "lacks 11 tensors: 'blk.1.attn_k.weight', .* and 8 more"),
        ({"gemma2__block_count": (raw.U64, 2**60)}, "has 13 tensors, too few for the 1152921504606846976 layers"),
        ({"gemma2__attention__key_length": (U32, 3)}, "value_length` is 4, which is not implemented"),
        ({"gemma2__attention__value_length": (U32, 3)}, "value_length` is 3, which is not implemented"),
        ({"gemma2__embedding_length": (U32, 7)}, r"'token_embd.weight' has shape \(7, 6\); .* ask \(7, 7\)"),
        ({"gemma2__attention__head_count": (U32, 3)}, r"'blk.0.attn_q.weight' has shape \(8, 6\); .* ask \(12, 6\)"),
        ({"gemma2__attention__head_count_kv": (U32, 4)}, "describe no Gemma 2 model: `num_query_heads` must be"),
        ({"gemma2__vocab_size": (U32, 8)}, "`gemma2.vocab_size` is 8, which is not implemented"),
        ({"gemma2__rope__dimension_count": (U32, 2)}, "rope.dimension_count` is 2, which is not implemented"),
        ({"gemma2__rope__freq_base_swa": (F32, 1e6)}, "rope.freq_base_swa` is 1000000.0, which is not implemented"),
        ({"gemma2__rope__scaling__type": (STRING, "yarn")}, "rope.scaling.type` is 'yarn', which is not implemented"),
        ({"gemma2__rope__scaling__factor": (F32, 2.0)}, "rope.scaling.factor` is 2.0, which is not implemented"),
        ({"gemma2__rope__scale_linear": (F32, 2.0)}, "rope.scale_linear` is 2.0, which is not implemented"),
        ({"gemma2__rope__scaling__attn_factor": (F32, 2.0)}, "attn_factor` is 2.0, which is not implemented but for"),
        ({"gemma2__rope__scaling__attn_factor": (F64, 1.0)}, "attn_factor` is 1.0, which is not implemented but for"),
        ({"gemma2__attention__sliding_window_pattern": (U32, 6)}, "sliding_window_pattern` is 6, which is not"),
        (
            {"gemma2__attention__sliding_window_pattern": (ARRAY, (BOOL, [False]))},
            "sliding_window_pattern` is an array of 1, which is not implemented",
        ),
        ({"gemma2__attention__causal": (BOOL, False)}, "attention.causal` is False, which is not implemented"),
        ({"gemma2__expert_count": (U32, 8)}, "`gemma2.expert_count` is 8, which is not implemented"),
        ({"gemma2__" + "x" * 9999: (U32, 8)}, "`gemma2.x+` is 8, which is not implemented"),
        ({"gemma2_keras__secret": (U32, 8)}, "has 'gemma2_keras.secret': install a newer gemma2-keras"),
        (
            {"gemma2_keras__layer_norm_epsilon": (F64, 1e-5)},
            "epsilon` is 9.99.*e-07, but `gemma2_keras.layer_norm_epsi",
        ),
        ({"gemma2_keras__layer_norm_epsilon": (F32, 1e-6)}, "epsilon` is 9.99.*e-07; it must be a float64 above 0"),
        ({"gemma2_keras__final_logit_soft_cap": (F64, np.inf)}, "but `gemma2_keras.final_logit_soft_cap` inf"),
        ({"gemma2_keras__query_pre_attention_scalar": (F64, 5.0)}, "attn_factor` is 1.0, which is not implemented but"),
        ({"gemma2_keras__query_pre_attention_scalar": (F64, 1e-320)}, "attn_factor` is 1.0, which is not implemented"),
        ({"gemma2_keras__query_pre_attention_scalar": (F64, np.nan)}, "it must be a float64 above 0"),
        ({"gemma2_keras__remainder__output_norm.weight": (ARRAY, (F32, [0.0]))}, "is no float32 for each number of a"),
        ({"gemma2_keras__remainder__output_norm.weight": (F32, 0.0)}, "is no float32 for each number of a norm"),
        ({"gemma2_keras__remainder__token_embd.weight": (ARRAY, (F32, [0.0] * 6))}, "is no float32 for each number"),
        (
            {"gemma2_keras__remainder__output_norm.weight": (ARRAY, (F32, [np.nan] * 6))},
            "is no float32 for each number of a norm: 'output_norm.weight'",
        ),
    ],
)
def test_keys_that_are_missing_wrong_or_not_implemented(refused, changes, message):
    refused(message, keys=changed(**changes))


@pytest.mark.once
def test_tensors_that_are_missing_extra_or_misshapen(refused):
    tensors = raw.smallest_tensors()
    refused("lacks 1 tensors: 'blk.0.ffn_up.weight'", tensors=[t for t in tensors if "ffn_up" not in t["name"]])
    refused("lacks 1 tensors: 'token_embd.weight'", tensors=tensors[1:])
    for name in ("output.weight", "rope_freqs.weight", "blk.1.attn_q.weight", "blk.0.attn_q.bias"):
        refused(f"has 1 tensors that no Gemma 2 has: '{re.escape(name)}'", tensors=[*tensors, raw.tensor(name, (2, 3))])
    # As many numbers the other way round.
    turned = [raw.tensor(t["name"], t["shape"][::-1]) if "ffn_up" in t["name"] else t for t in tensors]
    refused(r"'blk.0.ffn_up.weight' has shape \(6, 5\); the keys of the file ask \(5, 6\)", tensors=turned)


@pytest.mark.once
@pytest.mark.parametrize(
    "changes",
    [
        {"gemma2__attention__sliding_window": (U32, 3)},
        {"general__type": (STRING, "model"), "general__file_type": (U32, 7), "general__name": (STRING, "a" * 999)},
        {"general__base_model__0__name": (STRING, "Gemma"), "general__tags": (ARRAY, (STRING, ["a"]))},
        {"gemma2__vocab_size": (U32, 7), "gemma2__rope__dimension_count": (U32, 4)},
        {"gemma2__rope__freq_base": (F32, 10_000.0), "gemma2__rope__freq_base_swa": (F32, 10_000.0)},
        {"gemma2__rope__scaling__type": (STRING, "none"), "gemma2__attention__causal": (BOOL, True)},
        {"gemma2__attention__sliding_window_pattern": (U32, 2)},
        {"gemma2__attention__sliding_window_pattern": (ARRAY, (BOOL, [True]))},
        {"gemma2__attn_logit_softcapping": ..., "gemma2__final_logit_softcapping": ...},
        {"quantize__imatrix__file": (STRING, "x"), "someone__remark": (U32, 1), "split__count": (raw.U16, 1)},
        {"gemma2__block_count": (raw.I64, 1), "gemma2__attention__head_count": (raw.U8, 2)},
    ],
)
def test_keys_that_change_nothing(tmp_path, changes):
    (tmp_path / "x.gguf").write_bytes(raw.whole(changed(**changes), raw.smallest_tensors()))
    config = GgufCheckpoint(tmp_path / "x.gguf").config
    assert config == Gemma2Config(7, 1, 2, 1, 6, 5, 4, sliding_window_size=3, context_length=16)


@pytest.mark.once
def test_a_file_that_says_nothing_of_the_window_has_that_of_gemma_2(tmp_path):
    (tmp_path / "x.gguf").write_bytes(raw.whole(changed(gemma2__attention__sliding_window=...), raw.smallest_tensors()))
    assert GgufCheckpoint(tmp_path / "x.gguf").config.sliding_window_size == 4096


@pytest.mark.once
def test_matrices_of_several_types_make_float32(tmp_path):
    tensors = raw.smallest_tensors()
    tensors[0] = raw.tensor("token_embd.weight", (7, 6), raw.TYPE_BF16)
    (tmp_path / "x.gguf").write_bytes(raw.whole(raw.smallest_keys(), tensors))
    checkpoint = GgufCheckpoint(tmp_path / "x.gguf")
    assert checkpoint.dtype == "float32"
    assert checkpoint.read("model.embed_tokens.weight").dtype == ml_dtypes.bfloat16
    assert checkpoint.read("model.norm.weight").dtype == np.float32


@pytest.mark.once
@pytest.mark.parametrize("remainder", [0.0, 3e38])
def test_a_norm_beyond_the_dtype_of_the_matrices_is_refused(tmp_path, remainder):
    held = Held(ODD)
    held.tensors["model.norm.weight"][4] = 70_000.0 if not remainder else 3e38
    write(tmp_path / "x.gguf", held, dtype="float16")
    checkpoint = GgufCheckpoint(tmp_path / "x.gguf")
    if remainder:
        checkpoint._keys["gemma2_keras.remainder.output_norm.weight"] = np.full(24, remainder, "float32")
    with pytest.raises(CheckpointError, match=r"'output_norm.weight' has numbers that float16 cannot hold"):
        checkpoint.read("model.norm.weight")
    checkpoint.read("model.layers.0.input_layernorm.weight")


@pytest.mark.once
def test_a_quantised_file_of_ours_is_refused_by_name(tmp_path):
    write(tmp_path / "x.gguf", Held(Gemma2Config(**{**ODD.to_dict(), "hidden_dim": 64})), dtype="q8_0")
    assert {"Q8_0", "F16", "F32"} == set(types(tmp_path / "x.gguf").values())
    with pytest.raises(CheckpointError, match=r"'token_embd.weight' in type Q8_0; read are F32, F16, BF16\. Quantised"):
        GgufCheckpoint(tmp_path / "x.gguf")
