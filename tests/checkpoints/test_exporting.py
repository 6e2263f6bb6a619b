from __future__ import annotations

import json
import signal
import warnings

import keras
import numpy as np
import pytest

from gemma2_keras import Gemma2CausalLM
from gemma2_keras.checkpoints.contents import LiveCheckpoint
from gemma2_keras.checkpoints.exporting import convert
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.errors import CheckpointError, PresetError
from tests.preprocessing import tiny

FORMATS = ["transformers", "keras-hub", "gguf"]


@pytest.fixture(autouse=True)
def _quiet():
    """What KerasHub and GGUF cannot say is told by tests of theirs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "KerasHub |`query_pre_attention_scalar` is", UserWarning)
        yield


def model_of(dtype: str, **sizes) -> Gemma2CausalLM:
    """Odd shapes that every format can hold; norms whose weights 1 + w does not keep in float32."""
    # KerasHub's other scale: width / heads.
    model = tiny.causal_lm(**{"query_pre_attention_scalar": 6, "context_length": 8192, "dtype": dtype, **sizes})
    random = np.random.default_rng(0)
    for weight in model.backbone.weights:
        weight.assign(random.normal(size=weight.shape) * 10.0 ** random.integers(-9, 1, weight.shape))
    return model


def contents(model) -> dict[str, bytes]:
    checkpoint = LiveCheckpoint(model.backbone)
    return {name: checkpoint.read(name).tobytes() for name in weight_map(model.backbone.config)}


def export(model, to: str, path, **options) -> None:
    {
        "transformers": model.export_to_transformers,
        "keras-hub": model.export_to_keras_hub,
        "gguf": model.export_to_gguf,
    }[to](path, **options)


def place(folder, to: str):
    return folder / ("model.gguf" if to == "gguf" else to)


@pytest.mark.parametrize("shard", [10, 2e-5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", FORMATS)
def test_out_and_in_is_the_same_bit_for_bit(tmp_path, to, dtype, shard):
    model, path = model_of(dtype), place(tmp_path, to)
    export(model, to, path, **({} if to == "gguf" else {"max_shard_size": shard}))
    if to != "gguf":
        assert (len(list(path.glob("*model*[0-9].*"))) + len(list(path.glob("model_*.h5"))) > 1) == (shard < 1)
    again = Gemma2CausalLM.from_preset(path)
    assert contents(again) == contents(model)
    assert again.backbone.config == model.backbone.config
    assert again.backbone.dtype_policy.name == dtype
    text = "The cat sat, <end_of_turn>\n  7 + 5 \u2581 = \U0001f408"
    assert again.preprocessor.tokenizer.encode(text) == model.preprocessor.tokenizer.encode(text)
    if to != "gguf":
        assert again.preprocessor.sequence_length == 16


@pytest.mark.once
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_through_every_format_and_back(tmp_path, dtype):
    model = model_of(dtype)
    model.save_to_preset(tmp_path / "start")
    source = tmp_path / "start"
    for i, to in enumerate(["transformers", "keras-hub", "gguf", "keras-hub", "transformers", "gguf", "transformers"]):
        (tmp_path / str(i)).mkdir()
        convert(source, place(tmp_path / str(i), to), to)
        source = place(tmp_path / str(i), to)
    again = Gemma2CausalLM.from_preset(source)
    assert contents(again) == contents(model)
    assert again.backbone.config == model.backbone.config
    assert again.preprocessor.tokenizer.encode("The cat sat.") == model.preprocessor.tokenizer.encode("The cat sat.")


@pytest.mark.once
@pytest.mark.parametrize("to", FORMATS)
def test_a_conversion_writes_what_an_export_writes(tmp_path, to):
    model = model_of("float32")
    model.save_to_preset(tmp_path / "saved")
    (tmp_path / "exported").mkdir()
    (tmp_path / "converted").mkdir()
    export(model, to, place(tmp_path / "exported", to), dtype="bfloat16")
    convert(tmp_path / "saved", place(tmp_path / "converted", to), to, dtype="bfloat16")
    files = sorted(path.relative_to(tmp_path / "exported") for path in (tmp_path / "exported").rglob("*"))
    assert files == sorted(path.relative_to(tmp_path / "converted") for path in (tmp_path / "converted").rglob("*"))
    for path in files:
        # KerasHub's folders say when they were made, and HDF5 files as well.
        if (tmp_path / "exported" / path).is_file() and path.name not in ("metadata.json", "model.weights.h5"):
            assert (tmp_path / "exported" / path).read_bytes() == (tmp_path / "converted" / path).read_bytes(), path
    assert contents(Gemma2CausalLM.from_preset(place(tmp_path / "converted", to))) == contents(
        Gemma2CausalLM.from_preset(place(tmp_path / "exported", to))
    )


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("to", FORMATS)
def test_an_adapter_is_merged_as_in_memory(tmp_path, to, dora):
    model = tiny.causal_lm(num_layers=1, query_pre_attention_scalar=6, context_length=8192)
    model.save_to_preset(tmp_path / "base")
    model.enable_lora(2, alpha=3, targets="all-linear", use_dora=dora)
    for layer in model.backbone.linear_layers().values():
        layer.lora_b.assign(np.random.default_rng(0).normal(size=layer.lora_b.shape))
    model.save_adapter(tmp_path / "adapter")
    convert(tmp_path / "base", place(tmp_path, to), to, adapter=tmp_path / "adapter")
    again = Gemma2CausalLM.from_preset(place(tmp_path, to))
    assert contents(again) == contents(model)
    assert contents(again) != contents(Gemma2CausalLM.from_preset(tmp_path / "base"))


def test_an_adapter_is_kept_beside(tmp_path):
    model = tiny.causal_lm(num_layers=1)
    base = contents(model)
    model.enable_lora(2)
    layer = model.backbone.linear_layers()["model.layers.0.self_attn.q_proj"]
    layer.lora_b.assign(np.ones(layer.lora_b.shape))
    model.export_to_transformers(tmp_path / "out", merge_adapter=False)
    again = Gemma2CausalLM.from_preset(tmp_path / "out")
    assert contents(again) == base
    again.load_adapter(tmp_path / "out" / "adapter")
    assert contents(again) == contents(model) != base
    # Without one, and merged, nothing lies beside.
    model.export_to_transformers(tmp_path / "out")
    assert not (tmp_path / "out" / "adapter").exists()
    assert contents(Gemma2CausalLM.from_preset(tmp_path / "out")) == contents(model)


@pytest.mark.once
@pytest.mark.parametrize("to", FORMATS)
def test_what_is_not_ours_stays(tmp_path, to):
    model = model_of("float32", num_layers=1)
    path = place(tmp_path, to)
    if to == "gguf":
        path.write_text("thesis")
    else:
        path.mkdir()
        (path / "thesis.txt").write_text("thesis")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(FileExistsError, match="exists and is no"):
        export(model, to, path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.once
@pytest.mark.parametrize("to", FORMATS)
def test_an_earlier_export_is_replaced_and_notes_in_it_stay(tmp_path, to):
    path = place(tmp_path, to)
    export(model_of("float32", num_layers=2), to, path)
    if to != "gguf":
        (path / "notes.txt").write_text("mine")
    export(model_of("float32", num_layers=1), to, path)
    assert Gemma2CausalLM.from_preset(path).backbone.config.num_layers == 1
    assert to == "gguf" or (path / "notes.txt").read_text() == "mine"


@pytest.mark.once
@pytest.mark.parametrize("to", FORMATS)
def test_what_cannot_be_written_is_told_before_anything_is(tmp_path, to):
    model, path = model_of("float32", num_layers=1), place(tmp_path, to)
    with pytest.raises(ValueError, match=r"`dtype` must be .*float32.*; given 'int3'"):
        export(model, to, path, dtype="int3")
    if to != "gguf":
        with pytest.raises(ValueError, match=r"`dtype` must be float32, bfloat16, float16, or None .*given 'q8_0'"):
            export(model, to, path, dtype="q8_0")
        with pytest.raises(ValueError, match=r"`max_shard_size` must be above 0 GB, or None; given -1"):
            export(model, to, path, max_shard_size=-1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.once
def test_a_conversion_says_what_is_wrong(tmp_path):
    tiny.causal_lm(num_layers=1).save_to_preset(tmp_path / "saved")
    with pytest.raises(ValueError, match="`to` must be one of transformers, keras-hub, gguf; given 'onnx'"):
        convert(tmp_path / "saved", tmp_path / "out", "onnx")
    with pytest.raises(PresetError, match="There is no folder"):
        convert(tmp_path / "absent", tmp_path / "out", "gguf")
    with pytest.raises(CheckpointError, match="There is no folder"):
        convert(tmp_path / "saved", tmp_path / "out", "transformers", adapter=tmp_path / "absent")
    (tmp_path / "saved" / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "saved" / "config.json").read_text()), "rope_scaling": {"factor": 2}})
    )
    with pytest.raises(CheckpointError, match="`rope_scaling` is"):
        convert(tmp_path / "saved", tmp_path / "out", "transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.once
def test_damage_that_is_found_half_way_leaves_the_earlier_result(tmp_path):
    model = model_of("float32", num_layers=1)
    model.save_to_preset(tmp_path / "good")
    model.backbone.layer_norm.weight.assign(np.full(24, np.nan))
    model.save_to_preset(tmp_path / "bad")
    convert(tmp_path / "good", tmp_path / "out", "keras-hub")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' holds numbers that are not finite"):
        convert(tmp_path / "bad", tmp_path / "out", "keras-hub")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    convert(tmp_path / "bad", tmp_path / "out", "keras-hub", check_finite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good", "out"]


@pytest.mark.once
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"query_pre_attention_scalar": 7.5}, "`query_pre_attention_scalar` is 7.5; transformers takes whole numbers"),
        ({"hidden_dim": 26}, "`hidden_dim` is 26, which transformers takes only as a multiple of `num_query_heads`, 4"),
    ],
)
def test_what_transformers_would_not_load_is_not_written_for_it(tmp_path, sizes, message):
    model = tiny.causal_lm(num_layers=1, **sizes)
    with pytest.raises(ValueError, match=message):
        model.export_to_transformers(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_to_preset(tmp_path / "out")
    assert contents(Gemma2CausalLM.from_preset(tmp_path / "out")) == contents(model)


@pytest.mark.once
def test_a_gguf_file_is_known_by_its_content(tmp_path):
    model = model_of("float32", num_layers=1)
    model.export_to_gguf(tmp_path / "mine")
    assert contents(Gemma2CausalLM.from_preset(tmp_path / "mine")) == contents(model)
    (tmp_path / "other").write_text("GGU")
    with pytest.raises(PresetError, match="is a file; give the folder that holds it"):
        Gemma2CausalLM.from_preset(tmp_path / "other")


@pytest.fixture
def small_files():
    """A disk on which no file gets longer than 4 kB."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.once
@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_is_an_error_of_the_system_and_leaves_the_earlier_result(tmp_path, small_files, to):
    model, path = model_of("float32", num_layers=1), place(tmp_path, to)
    export(model, to, path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    small_files()
    with pytest.raises(OSError, match=r"written|too large"):
        export(model, to, path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.once
def test_a_file_is_not_replaced_by_itself_quantised(tmp_path):
    convert("gemma2_tiny_en", tmp_path / "x.gguf", "gguf")
    before = (tmp_path / "x.gguf").read_bytes()
    with pytest.raises(ValueError, match=r"x\.gguf is the source, and quantised it could not be read again"):
        convert(tmp_path / "x.gguf", tmp_path / "x.gguf", "gguf", dtype="q8_0")
    assert (tmp_path / "x.gguf").read_bytes() == before


@pytest.mark.once
def test_what_an_adapter_makes_is_looked_at(tmp_path):
    model = tiny.causal_lm(num_layers=1)
    model.save_to_preset(tmp_path / "model")
    model.enable_lora(2, alpha=1e200)
    for weight in model.trainable_weights:
        weight.assign(keras.ops.ones(weight.shape))
    model.save_adapter(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="holds numbers that are not finite"):
        convert(tmp_path / "model", tmp_path / "out", "transformers", adapter=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()
