from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM

PROJECTIONS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "feed_forward": ("gate_proj", "up_proj", "down_proj"),
}
LAYERS = 2


@pytest.fixture
def model():
    backbone = Gemma2Backbone(
        vocabulary_size=31,
        num_layers=LAYERS,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=24,
        intermediate_dim=20,
        head_dim=8,
        sliding_window_size=3,
    )
    return Gemma2CausalLM(backbone)


@pytest.fixture
def inputs():
    ids = np.random.default_rng(0).integers(0, 31, (2, 6)).astype("int32")
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}


def projections(model, name):
    branch = next(branch for branch, names in PROJECTIONS.items() if name in names)
    return [getattr(getattr(layer, branch), name) for layer in model.backbone.transformer_layers]


@pytest.mark.parametrize(
    "targets", [None, ("o_proj",), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")]
)
def test_only_the_adapters_of_the_targets_are_trainable(targets, model):
    model.enable_lora(3, targets)
    chosen = targets or ("q_proj", "v_proj")
    adapters = [v for name in chosen for layer in projections(model, name) for v in (layer.lora_a, layer.lora_b)]
    assert {id(v) for v in model.trainable_variables} == {id(v) for v in adapters}
    assert len(model.trainable_variables) == 2 * LAYERS * len(chosen)
    for name in chosen:
        for layer in projections(model, name):
            units, width = layer.weight.shape
            assert (tuple(layer.lora_a.shape), tuple(layer.lora_b.shape)) == ((3, width), (units, 3))
    others = {name for names in PROJECTIONS.values() for name in names} - set(chosen)
    assert all(layer.lora_rank is None for name in others for layer in projections(model, name))


def test_output_is_at_first_unchanged(model, inputs):
    before = model.predict_on_batch(inputs)
    model.enable_lora(3)
    model.predict_function = None
    np.testing.assert_array_equal(model.predict_on_batch(inputs), before)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (4, 1.0), (10, 2.5), (0.5, 0.125)])
def test_merged_weight_is_base_plus_scaled_product(alpha, scale, model):
    model.enable_lora(4, ["down_proj"], alpha)
    for layer in projections(model, "down_proj"):
        base, a = ops.convert_to_numpy(layer.weight), ops.convert_to_numpy(layer.lora_a)
        np.testing.assert_array_equal(layer.merged_weight(), base)
        b = np.random.default_rng(1).normal(size=layer.lora_b.shape).astype("float32")
        layer.lora_b.assign(b)
        np.testing.assert_allclose(layer.merged_weight(), base + scale * (b @ a), rtol=1e-5, atol=1e-6)


def test_merged_weights_in_a_plain_model_give_the_outputs_of_the_adapters(model, inputs):
    plain = Gemma2CausalLM(Gemma2Backbone.from_config(model.backbone.get_config()))
    plain.set_weights(model.get_weights())
    base = plain.predict_on_batch(inputs)
    model.enable_lora(4, alpha=10)
    random = np.random.default_rng(1)
    for name in ("q_proj", "v_proj"):
        for layer, other in zip(projections(model, name), projections(plain, name), strict=True):
            layer.lora_b.assign(random.normal(size=layer.lora_b.shape).astype("float32"))
            other.weight.assign(layer.merged_weight())
    found = model.predict_on_batch(inputs)
    np.testing.assert_allclose(found, plain.predict_on_batch(inputs), atol=1e-5)
    assert np.abs(found - base).max() > 1e-2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0,), "rank"),
        ((-2,), "rank"),
        ((1.5,), "rank"),
        (("4",), "rank"),
        ((True,), "rank"),
        ((4, ["query"]), "target_layer_names"),
        ((4, ["q_proj", "nothing"]), "target_layer_names"),
        ((4, []), "target_layer_names"),
        ((4, ["input_layernorm"]), "target_layer_names"),
        ((4, None, 0), "alpha"),
        ((4, None, -1.0), "alpha"),
        ((4, None, float("nan")), "alpha"),
    ],
)
def test_a_refused_call_changes_nothing(arguments, named, model):
    trainable = [id(v) for v in model.trainable_variables]
    variables = [id(v) for v in model.variables]
    with pytest.raises(ValueError, match=f"`{named}`"):
        model.enable_lora(*arguments)
    assert [id(v) for v in model.trainable_variables] == trainable
    assert [id(v) for v in model.variables] == variables
    model.enable_lora(4)


def test_a_second_call_is_refused_and_changes_nothing(model):
    model.enable_lora(4)
    trainable = [id(v) for v in model.trainable_variables]
    for targets in (None, ["v_proj"], ["k_proj", "v_proj"]):
        with pytest.raises(ValueError, match="already has an adapter"):
            model.enable_lora(2, targets)
        assert [id(v) for v in model.trainable_variables] == trainable
        assert all(layer.lora_rank is None for layer in projections(model, "k_proj"))


def test_training_after_training_moves_the_adapters_alone(model, inputs):
    model.compile(keras.optimizers.Adam(1e-2), weighted_metrics=None)
    model.fit(inputs, inputs["token_ids"], batch_size=2, verbose=0)
    frozen = {v.path: ops.convert_to_numpy(v) for v in model.weights}
    model.enable_lora(4)
    model.fit(inputs, inputs["token_ids"], batch_size=2, verbose=0)
    for variable in model.non_trainable_variables:
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), frozen[variable.path])
    assert len(frozen) == len(model.non_trainable_variables)
    for layer in projections(model, "q_proj"):
        assert ops.convert_to_numpy(layer.lora_b).any()


def test_a_trained_model_with_adapters_loads_and_goes_on(model, inputs, tmp_path):
    model.enable_lora(4, alpha=6)
    model.compile(keras.optimizers.Adam(0.01))
    for _ in range(2):
        model.train_on_batch(inputs, inputs["token_ids"])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert all(layer.lora_rank == 4 for layer in projections(again, "v_proj"))
    assert [v.shape for v in again.trainable_variables] == [v.shape for v in model.trainable_variables]
    np.testing.assert_allclose(again.predict_on_batch(inputs), model.predict_on_batch(inputs), atol=1e-5)
    # The optimizer's moments came along: the next steps are the same.
    for _ in range(3):
        losses = [float(m.train_on_batch(inputs, inputs["token_ids"])[0]) for m in (model, again)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
