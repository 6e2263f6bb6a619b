from __future__ import annotations

import os

import keras
import numpy as np
import pytest
from keras import ops

import gemma2_keras
from gemma2_keras import Gemma2Backbone, Gemma2Config
from gemma2_keras.errors import InputError

TINY = {
    "vocabulary_size": 31,
    "num_layers": 3,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 24,
    "intermediate_dim": 20,
    "head_dim": 8,
    "query_pre_attention_scalar": 6,
    "attention_logit_soft_cap": 20.0,
    "final_logit_soft_cap": None,
    "sliding_window_size": 3,
    "layer_norm_epsilon": 1e-5,
    "rope_max_wavelength": 500.0,
    "dropout": 0.1,
    "context_length": 64,
}


def inputs(rows=2, length=5):
    ids = np.random.default_rng(0).integers(0, TINY["vocabulary_size"], (rows, length)).astype("int32")
    mask = np.ones_like(ids)
    mask[0, :2] = 0
    return {"token_ids": ids, "padding_mask": mask}


@pytest.fixture(scope="module")
def backbone():
    return Gemma2Backbone(**TINY)


def outputs(backbone, given):
    return np.asarray(ops.convert_to_numpy(ops.cast(backbone.predict_on_batch(given), "float32")))


# What KerasHub asks of a backbone


def test_call_gives_hidden_states(backbone):
    found = ops.convert_to_numpy(backbone(inputs()))
    assert found.shape == (2, 5, 24)
    np.testing.assert_allclose(found, outputs(backbone, inputs()), rtol=1e-5, atol=1e-5)
    # The last norm, whose weight starts at zero.
    np.testing.assert_allclose((found**2).mean(-1), 1, rtol=1e-2)


def test_arguments_are_those_of_the_configuration(backbone):
    config = backbone.get_config()
    assert {name: config[name] for name in TINY} == TINY
    assert backbone.config == Gemma2Config(**TINY)
    again = Gemma2Backbone.from_config(config)
    assert again.get_config() == config
    assert [w.shape for w in again.weights] == [w.shape for w in backbone.weights]


def test_keras_file_gives_the_same_outputs(backbone, tmp_path):
    backbone.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(again, Gemma2Backbone)
    assert again.config == backbone.config
    for found, saved in zip(again.get_weights(), backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(found, saved)
    np.testing.assert_array_equal(outputs(again, inputs()), outputs(backbone, inputs()))


@pytest.mark.parametrize("policy", ["bfloat16", "float16", "mixed_bfloat16", "mixed_float16"])
def test_each_policy_computes_in_its_dtype(policy, backbone):
    model = Gemma2Backbone(**TINY, dtype=policy)
    model.set_weights(backbone.get_weights())
    compute, variable = policy.removeprefix("mixed_"), "float32" if "mixed" in policy else policy
    assert keras.backend.standardize_dtype(model.output.dtype) == compute
    assert {w.dtype for w in model.weights} == {variable}
    assert keras.dtype_policies.get(model.get_config()["dtype"]).name == policy
    found, expected = outputs(model, inputs()), outputs(backbone, inputs())
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, atol=0.1)
    assert (found != expected).any()


def test_output_keeps_the_dtype_of_a_policy():
    found = Gemma2Backbone(**TINY, dtype="bfloat16")(inputs(1, 2))
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"


def test_odd_layers_see_all_and_even_ones_their_window(backbone):
    assert [layer.local for layer in backbone.transformer_layers] == [True, False, True]


def test_rows_may_be_of_any_length(backbone):
    assert set(backbone.input_shape) == {(None, None)}
    assert backbone.output_shape == (None, None, 24)


# Sizes of the published models

SIZES = {"gemma2_2b_en": 2_614_341_888, "gemma2_9b_en": 9_241_705_984, "gemma2_27b_en": 27_227_128_320}


@pytest.mark.once
@pytest.mark.parametrize(("preset", "parameters"), SIZES.items())
def test_configuration_counts_the_parameters_of_the_paper(preset, parameters):
    assert gemma2_keras.describe_preset(preset).architecture.parameter_count == parameters


def resident_megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.fixture
def without_memory():
    """Variables made inside get no values, nor do they get them later: Keras notes them to do so at the next chance."""
    with keras.StatelessScope(initialize_variables=False):
        yield
    keras.utils.clear_session()


@pytest.mark.usefixtures("without_memory")
@pytest.mark.parametrize(("preset", "parameters"), SIZES.items())
def test_model_of_that_size_is_built_without_memory_for_it(preset, parameters):
    before = resident_megabytes()
    backbone = Gemma2Backbone(**gemma2_keras.describe_preset(preset).architecture.to_dict())
    assert backbone.count_params() == parameters
    assert sum(int(np.prod(w.shape, dtype="int64")) for w in backbone.weights) == parameters
    assert resident_megabytes() - before < 200


def test_configuration_counts_what_is_built(backbone):
    assert backbone.count_params() == backbone.config.parameter_count


# Hyperparameters that cannot be


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, 0) for name in TINY if TINY[name] is not None and name != "dropout"],
        *[(name, -1) for name in TINY],
        ("vocabulary_size", 3.0),
        ("num_layers", True),
        ("hidden_dim", "24"),
        ("hidden_dim", None),
        ("head_dim", 7),
        ("num_key_value_heads", 3),
        ("dropout", 1.0),
        ("attention_logit_soft_cap", "20"),
        ("final_logit_soft_cap", 0),
        ("layer_norm_epsilon", None),
        ("sliding_window_size", 2.5),
        ("rope_max_wavelength", float("nan")),
        ("query_pre_attention_scalar", float("inf")),
        ("attention_logit_soft_cap", float("inf")),
    ],
)
def test_a_hyperparameter_that_cannot_be_is_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Gemma2Backbone(**{**TINY, name: value})


# Calls that cannot be


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": np.ones(5, "int32"), "padding_mask": np.ones(5, "int32")}, "shape"),
        ({"token_ids": np.ones((1, 2, 5), "int32")}, "shape"),
        ({"padding_mask": np.ones((2, 4), "int32")}, "one shape"),
        ({"token_ids": np.ones((2, 5), "float32")}, "float32"),
        ({"token_ids": np.full((2, 5), 31, "int32")}, "between 0 and 30; given 31"),
        ({"token_ids": np.full((2, 5), -1, "int32")}, "given -1"),
        ({"token_ids": np.ones((0, 5), "int32"), "padding_mask": np.ones((0, 5), "int32")}, "empty"),
        ({"token_ids": np.ones((2, 0), "int32"), "padding_mask": np.ones((2, 0), "int32")}, "empty"),
    ],
)
def test_a_call_that_cannot_be_is_refused(change, message, backbone):
    given = {**inputs(), **change}
    with pytest.raises(InputError, match=message):
        backbone(given)
    with pytest.raises(InputError, match=message):
        backbone({name: ops.convert_to_tensor(value) for name, value in given.items()})


@pytest.mark.parametrize("given", [{"token_ids": np.ones((2, 5), "int32")}, np.ones((2, 5), "int32"), "text"])
def test_a_call_without_both_inputs_is_refused(given, backbone):
    with pytest.raises(InputError, match="padding_mask"):
        backbone(given)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="PyTorch's own tracing")
def test_pytorch_traces_the_model(backbone):
    import torch

    given = {name: torch.from_numpy(array) for name, array in inputs().items()}
    traced = torch.export.export(backbone, (given,)).module()
    with torch.no_grad():
        np.testing.assert_allclose(traced(given).numpy(), outputs(backbone, inputs()), rtol=1e-5, atol=1e-5)


def test_a_layout_needs_the_axis_it_is_cut_along():
    mesh = keras.distribution.DeviceMesh((1, 1), ["batch", "model"], ["cpu:0"])
    assert tuple(Gemma2Backbone.get_layout_map(mesh)["decoder_block_3/feed_forward/down_proj/weight"].axes) == (
        None,
        "model",
    )
    with pytest.raises(ValueError, match=r"`model_parallel_dim_name` must be an axis .* batch, model; given 'x'"):
        Gemma2Backbone.get_layout_map(mesh, "x")
