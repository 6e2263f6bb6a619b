from __future__ import annotations

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops
from safetensors.numpy import load_file, save_file

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM
from gemma2_keras.checkpoints import contents
from gemma2_keras.checkpoints.contents import ConvertedCheckpoint, LiveCheckpoint, converted, shards_of
from gemma2_keras.checkpoints.names import weight_map
from gemma2_keras.errors import CheckpointError
from tests.preprocessing import tiny

DTYPES = ["float32", "bfloat16", "float16"]
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path):
    tiny.causal_lm(num_layers=2).save_to_preset(tmp_path / "saved")
    return tmp_path / "saved"


def bits(backbone) -> dict[str, bytes]:
    checkpoint = LiveCheckpoint(backbone)
    return {name: checkpoint.read(name).tobytes() for name in weight_map(backbone.config)}


def test_float16_that_overflows_is_refused(tmp_path):
    model = tiny.causal_lm(num_layers=2)
    model.backbone.layer_norm.weight.assign(ops.full(model.backbone.layer_norm.weight.shape, 1e6))
    model.save_to_preset(tmp_path / "saved")
    message = f"'{NORM}' has numbers that float16 cannot hold"
    with pytest.raises(ValueError, match=message):
        model.export_to_transformers(tmp_path / "out", dtype="float16")
    with pytest.raises(ValueError, match=message):
        Gemma2CausalLM.from_preset(tmp_path / "saved", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.once
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7)])
def test_conversion_is_numpys(shape, monkeypatch):
    monkeypatch.setattr(contents, "_CONVERTED", 4)
    values = np.random.default_rng(0).normal(size=shape).astype("float32")
    assert converted(values, "float32") is values
    for dtype in ("bfloat16", "float16"):
        assert converted(values, dtype).dtype == dtype
        np.testing.assert_array_equal(converted(values, dtype), values.astype(dtype))


@pytest.mark.once
def test_shards_hold_all_tensors_in_order_and_no_more_than_they_may():
    checkpoint = LiveCheckpoint(tiny.backbone(dtype="bfloat16"))
    names = list(weight_map(checkpoint.config))
    assert shards_of(checkpoint, None) == [names]
    shards = shards_of(checkpoint, 5e-6)
    assert [name for shard in shards for name in shard] == names
    sizes = [sum(checkpoint.read(name).nbytes for name in shard) for shard in shards]
    assert len(shards) > 3
    assert all(size <= 5000 or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_none_are_refused_unless_asked_for(folder, dtype, number):
    tensors = {name: value.astype(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    tensors[NORM][3] = number
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"Tensor '{NORM}' holds numbers that are not finite .* `check_finite"):
        Gemma2CausalLM.from_preset(folder, dtype=dtype)
    norm = Gemma2CausalLM.from_preset(folder, dtype=dtype, check_finite=False).backbone.layer_norm.weight
    np.testing.assert_array_equal(ops.convert_to_numpy(norm).astype("float32")[3], np.float32(number))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_file_stays_as_it_is_whatever_becomes_of_the_weights(folder, dtype):
    if dtype == "bfloat16":
        Gemma2CausalLM.from_preset(folder, dtype=dtype).save_to_preset(folder)
    path = folder / "model.safetensors"
    before, model, other = path.read_bytes(), Gemma2CausalLM.from_preset(folder), Gemma2CausalLM.from_preset(folder)
    model.enable_lora(2)
    model.backbone.linear_layers()["model.layers.0.self_attn.q_proj"].lora_b.assign(np.ones((32, 2)))
    model.merge_adapter()
    for weight in model.backbone.weights:
        weight.assign(np.full(weight.shape, 3))
    assert path.read_bytes() == before
    assert bits(other.backbone) == bits(Gemma2Backbone.from_preset(folder)) != bits(model.backbone)


def test_training_all_weights_does_not_reach_the_file(folder):
    path = folder / "model.safetensors"
    before, model = path.read_bytes(), Gemma2CausalLM.from_preset(folder)
    start = bits(model.backbone)
    model.compile(keras.optimizers.SGD(0.5))
    model.fit(["The cat sat on the mat."] * 2, batch_size=1, verbose=0)
    assert path.read_bytes() == before
    assert bits(model.backbone).keys() == start.keys()
    assert all(bits(model.backbone)[name] != value for name, value in start.items())


def test_a_model_outlives_its_files(folder):
    model = Gemma2CausalLM.from_preset(folder)
    start = bits(model.backbone)
    tiny.causal_lm(num_layers=2).save_to_preset(folder)
    assert bits(Gemma2Backbone.from_preset(folder)) != start
    model.save_to_preset(folder)
    assert bits(Gemma2Backbone.from_preset(folder)) == bits(model.backbone) == start
    for path in folder.iterdir():
        path.unlink()
    assert bits(model.backbone) == start


@pytest.mark.parametrize("pad", range(0, 8))
def test_weights_at_any_place_in_the_file_are_loaded(folder, pad):
    path, expected = folder / "model.safetensors", bits(Gemma2Backbone.from_preset(folder))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    path.write_bytes(
        (length + pad).to_bytes(8, "little") + content[8 : 8 + length] + b" " * pad + content[8 + length :]
    )
    assert bits(Gemma2Backbone.from_preset(folder)) == expected


def test_a_live_checkpoint_is_with_or_without_its_adapter():
    backbone = tiny.backbone(num_layers=1)
    base = bits(backbone)
    backbone.enable_lora(2)
    layer = backbone.linear_layers()["model.layers.0.self_attn.q_proj"]
    layer.lora_b.assign(np.ones(layer.lora_b.shape))
    merged = bits(backbone)
    changed = {name for name in base if merged[name] != base[name]}
    assert changed == {"model.layers.0.self_attn.q_proj.weight"}
    for merge in (lambda: None, backbone.merge_adapter):
        merge()
        unmerged = LiveCheckpoint(backbone, merged=False)
        assert {name: unmerged.read(name).tobytes() for name in base} == base
        assert bits(backbone) == merged


def test_a_converted_checkpoint_has_one_dtype():
    checkpoint = ConvertedCheckpoint(LiveCheckpoint(tiny.backbone(num_layers=1)), "bfloat16")
    assert checkpoint.dtype == checkpoint.read(NORM).dtype == "bfloat16"
    assert ConvertedCheckpoint(LiveCheckpoint(tiny.backbone(num_layers=1)), None).dtype == "float32"


SPREAD = """
import keras
from gemma2_keras import Gemma2Backbone, Gemma2CausalLM

def generated():
    model = Gemma2CausalLM.from_preset("gemma2_tiny_en")
    return model, model.generate("The old captain", max_new_tokens=8)

_, alone = generated()
mesh = keras.distribution.DeviceMesh((1, 4), ["batch", "model"], keras.distribution.list_devices())
layout = Gemma2Backbone.get_layout_map(mesh)
keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch"))
model, together = generated()
assert together == alone
for weight in model.backbone.weights:
    parts = weight.value.addressable_shards
    assert len(parts) == 4
    share = 1 if "norm" in weight.path else 4
    assert parts[0].data.size * share == weight.value.size, weight.path
"""


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="Keras distributes weights on JAX alone.")
def test_each_device_gets_its_part_of_the_weights():
    flags = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", SPREAD],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
