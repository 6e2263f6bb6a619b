from __future__ import annotations

import dataclasses
import itertools
import sys
import types
import warnings

import keras
import numpy as np
import pytest

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM, Gemma2Config, describe_preset, estimate_memory, list_presets
from gemma2_keras.checkpoints import fitting
from gemma2_keras.checkpoints.fitting import MemoryEstimate, require_fit
from gemma2_keras.errors import PresetError, WontFit
from gemma2_keras.generation.programs import Engine
from gemma2_keras.generation.session import Session

# No two sizes coincide, and the window is shorter than the context.
CONFIG = Gemma2Config(560, 3, 4, 2, 24, 40, 8, sliding_window_size=6, context_length=96)
TWO_B = describe_preset("gemma2_2b_en").architecture


def nbytes(variables) -> int:
    return sum(keras.ops.convert_to_numpy(v).nbytes for v in variables)


def model(dtype="float32") -> Gemma2CausalLM:
    return Gemma2CausalLM(Gemma2Backbone(**CONFIG.to_dict(), dtype=dtype))


# What is counted exactly


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed_bfloat16"])
def test_weights_are_those_of_a_model(dtype):
    assert estimate_memory(CONFIG, dtype).weights == nbytes(model(dtype).weights)
    assert estimate_memory(CONFIG, keras.DTypePolicy(dtype)).weights == nbytes(model(dtype).weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "length"), [(1, 5), (3, 90)])
def test_the_cache_is_that_of_a_session(dtype, rows, length):
    session = Session(Engine(model(dtype).backbone), rows, length)
    held = sum(np.prod(x.shape) * (2 if dtype == "bfloat16" else 4) for pair in session._cache["layers"] for x in pair)
    assert estimate_memory(CONFIG, dtype, rows, length).cache == held


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 3},
        {"rank": 2, "targets": "all-linear", "alpha": 4},
        {"rank": 5, "targets": ["layers.[01].*.q_proj", "down_proj"], "use_dora": True, "name": "other"},
    ],
)
def test_what_training_adapters_keeps_is_what_keras_keeps(options):
    lm = model("bfloat16")
    lm.enable_lora(**options)
    lm.compile("adam")
    lm.optimizer.build(lm.trainable_variables)
    estimate = estimate_memory(CONFIG, "bfloat16", adapters=options, train=True)
    adapters = [v for v in lm.backbone.weights if "lora_" in v.path]
    assert estimate.adapters == estimate.gradients == nbytes(adapters) == nbytes(lm.trainable_variables)
    assert estimate.weights == nbytes(lm.weights) - nbytes(adapters)
    assert estimate.optimizer == nbytes(v for v in lm.optimizer.variables if len(v.shape))
    assert estimate_memory(CONFIG, "bfloat16", adapters=options).adapters == estimate.adapters


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_what_training_all_weights_keeps_is_what_keras_keeps(dtype):
    lm = model(dtype)
    lm.compile("adam")
    lm.optimizer.build(lm.trainable_variables)
    estimate = estimate_memory(CONFIG, dtype, train=True)
    assert estimate.gradients == estimate.weights == nbytes(lm.trainable_variables)
    assert estimate.optimizer == nbytes(v for v in lm.optimizer.variables if len(v.shape))
    assert estimate.adapters == estimate.cache == 0


# What is reckoned


@pytest.mark.once
def test_a_published_model_needs_what_its_numbers_say():
    estimate = estimate_memory("gemma2_2b_en", context=8192)
    assert estimate.weights == 2 * 2_614_341_888
    assert estimate.cache == 2 * 2 * 4 * 256 * 13 * (4096 + 64 + 8192)
    assert estimate.total == sum(dataclasses.asdict(estimate).values())
    assert estimate.gradients == estimate.optimizer == estimate.adapters == 0
    assert estimate.total < 1.3 * estimate.weights
    images = describe_preset("pali_gemma2_pt_3b_224")
    assert estimate_memory(images.name).weights == 2 * images.parameters


@pytest.mark.once
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", list_presets())
def test_no_preset_needs_less_for_more(name, train):
    estimates = [
        estimate_memory(name, batch=batch, context=context, adapters=rank, train=train)
        for batch, context, rank in ((1, 16, 1), (2, 64, 2), (4, 256, 8))
    ]
    for one, other in itertools.pairwise(estimates):
        assert all(a <= b for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True))
        assert one.total < other.total


def test_training_costs_what_is_asked_for():
    options = {"dtype": "bfloat16", "batch": 2, "context": 2048}
    whole = estimate_memory("gemma2_2b_en", train=True, **options)
    lora = estimate_memory("gemma2_2b_en", train=True, adapters=8, **options)
    lean = estimate_memory("gemma2_2b_en", train=True, adapters=8, remat=True, **options)
    assert whole.total > lora.total > estimate_memory("gemma2_2b_en", **options).total
    if keras.backend.backend() == "jax" and not fitting._on_accelerator():
        assert lean == lora
    else:
        assert lean.activations < lora.activations / 5
    everywhere = estimate_memory("gemma2_2b_en", train=True, adapters={"rank": 8, "targets": "all-linear"}, **options)
    assert everywhere.activations > lora.activations
    mixed = estimate_memory("gemma2_2b_en", "mixed_bfloat16", 2, 2048, train=True)
    assert mixed.activations - whole.activations == 2 * 2_614_341_888


@pytest.mark.once
def test_scores_are_counted_where_they_are_made(monkeypatch):
    sizes = []
    for made in (False, True):
        monkeypatch.setattr(fitting, "_makes_scores", lambda made=made: made)
        options = {"dtype": "float32", "context": 96, "adapters": 2}
        sizes.append(
            [
                estimate_memory(CONFIG, **options).activations,
                estimate_memory(CONFIG, **options, train=True).activations,
            ]
        )
    # At least the capped scores and the softmax of each of 3 layers and 4 heads.
    assert sizes[1][1] - sizes[0][1] >= 3 * 4 * 96 * 96 * 8
    assert sizes[1][0] > sizes[0][0]


@pytest.mark.once
def test_a_folder_is_looked_at_and_not_loaded(tmp_path):
    model("bfloat16").save_to_preset(tmp_path / "saved")
    assert estimate_memory(tmp_path / "saved", context=32) == estimate_memory(CONFIG, "bfloat16", context=32)


@pytest.mark.once
def test_an_estimate_is_shown_as_a_table():
    estimate = MemoryEstimate(weights=5_228_683_776, cache=1_400_000)
    assert str(estimate) == repr(estimate) == "weights  5.23 GB\ncache    1.40 MB\ntotal    5.23 GB"
    assert "<td" in estimate._repr_html_()
    assert "logits" not in estimate._repr_html_()


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("gemma2_2b",), PresetError, "Did you mean gemma2_2b_en"),
        ((3,), PresetError, "`name` must be .* given int"),
        (("hf://google/gemma-2-2b",), PresetError, "would have to be downloaded"),
        (("gemma2_2b_en", "int8"), ValueError, "`dtype` must be"),
        (("gemma2_2b_en", "mixed_float32"), ValueError, "mixed_float32"),
        (("gemma2_2b_en", None, 0), ValueError, "`batch` must be .* given 0"),
        (("gemma2_2b_en", None, 1, True), ValueError, "`context` must be .* given True"),
        (("gemma2_2b_en", None, 1, 8193), ValueError, "made for 8192 tokens"),
        (("gemma2_2b_en", None, 1, 10, 0), ValueError, "`rank` must be"),
        (("gemma2_2b_en", None, 1, 10, {"rank": 2, "zebra": 1}), ValueError, "`adapters` must be .*zebra"),
        (("gemma2_2b_en", None, 1, 10, {"rank": 2, "targets": "zebra"}), ValueError, "zebra"),
    ],
)
def test_what_cannot_be_estimated_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        estimate_memory(*arguments)


# What is required


@pytest.fixture
def free(monkeypatch):
    monkeypatch.delenv(fitting.CHECK, raising=False)

    def set_to(size, where="machine"):
        monkeypatch.setattr(fitting, "_free", lambda: (size, where))

    return set_to


@pytest.mark.once
def test_a_model_that_does_not_fit_is_refused_with_what_would(free):
    free(6_000_000_000)
    with pytest.raises(WontFit) as caught:
        require_fit(TWO_B, "float32", "gemma2_2b_en")
    for said in (
        "gemma2_2b_en needs 10.5 GB",
        "float32",
        "6.00 GB",
        "machine",
        'dtype="bfloat16", which takes 5.23 GB',
    ):
        assert said in str(caught.value)
    assert "gemma2_tiny_en, which takes 7.80 MB" in str(caught.value)
    assert isinstance(caught.value, MemoryError)


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "smaller"),
    [
        ("gemma2_instruct_9b_en", "gemma2_instruct_2b_en"),
        ("gemma2_27b_en", "gemma2_2b_en"),
        ("shieldgemma_27b_en", "shieldgemma_2b_en"),
        ("pali_gemma2_mix_10b_448", "pali_gemma2_mix_3b_448"),
    ],
)
def test_the_smaller_model_that_is_named_is_of_the_same_kind(free, name, smaller):
    free(8_000_000_000)
    preset = describe_preset(name)
    with pytest.raises(WontFit, match=rf"What would fit: {smaller}, which takes"):
        require_fit(preset.architecture, "bfloat16", name, preset.vision)


@pytest.mark.once
def test_where_nothing_would_fit_it_says_so(free):
    free(1_000_000)
    with pytest.raises(WontFit, match="No smaller dtype or preset would fit"):
        require_fit(TWO_B, "float32")


@pytest.mark.once
def test_weights_that_just_fit_bring_a_warning_and_more_room_none(free):
    free(5_500_000_000)
    with pytest.warns(UserWarning, match=r"The model needs 5.\d\d GB in bfloat16 .* a short conversation"):
        require_fit(TWO_B, keras.DTypePolicy("bfloat16"))
    free(6_000_000_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require_fit(TWO_B, "bfloat16")


@pytest.mark.once
def test_there_is_a_way_to_try_all_the_same(free, monkeypatch):
    free(1_000_000)
    monkeypatch.setenv(fitting.CHECK, "off")
    require_fit(TWO_B, "float32")
    monkeypatch.setenv(fitting.CHECK, "on")
    with pytest.raises(WontFit, match="GEMMA2_KERAS_MEMORY_CHECK=off"):
        require_fit(TWO_B, "float32")
    monkeypatch.setattr(keras.distribution, "distribution", lambda: object())
    require_fit(TWO_B, "float32")


@pytest.mark.once
def test_where_memory_is_unknown_nothing_is_refused(free):
    free(None)
    require_fit(TWO_B, "float32")


def test_on_a_cpu_it_is_the_machines_memory(monkeypatch):
    if fitting._on_accelerator():
        pytest.skip("this machine computes on an accelerator")
    monkeypatch.setattr(fitting, "available_bytes", lambda: 12345)
    assert fitting._free() == (12345, "machine")


@pytest.mark.once
@pytest.mark.parametrize(("stats", "free"), [({"bytes_limit": 80, "bytes_in_use": 30}, 50), (None, None)])
def test_on_a_gpu_it_is_the_devices_memory_as_jax_tells_it(monkeypatch, stats, free):
    device = types.SimpleNamespace(memory_stats=lambda: stats)
    fake = types.SimpleNamespace(default_backend=lambda: "gpu", local_devices=lambda: [device])
    monkeypatch.setitem(sys.modules, "jax", fake)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    assert fitting._free() == (free, "GPU")
    assert not fitting._has_kernels()
    assert fitting._makes_scores()


@pytest.mark.once
@pytest.mark.parametrize(("kind", "free"), [("cuda", 70), ("mps", None)])
def test_on_a_gpu_it_is_the_devices_memory_as_torch_tells_it(monkeypatch, kind, free):
    fake = types.SimpleNamespace(cuda=types.SimpleNamespace(mem_get_info=lambda: (70, 80)))
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    zeros = types.SimpleNamespace(device=types.SimpleNamespace(type=kind))
    monkeypatch.setattr(keras.ops, "zeros", lambda shape: zeros)
    assert fitting._free() == (free, "GPU")


@pytest.mark.once
def test_on_a_gpu_tensorflow_tells_nothing(monkeypatch):
    config = types.SimpleNamespace(list_physical_devices=lambda kind: [1] if kind == "GPU" else [])
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(config=config))
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    assert fitting._free() == (None, "GPU")
