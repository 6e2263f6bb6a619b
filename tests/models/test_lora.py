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


def adapted_modules(model, name="default"):
    return [module for module, layer in model.backbone.linear_layers().items() if name in layer.adapters]


@pytest.mark.once
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", 7 * LAYERS),
        ("down_proj", LAYERS),
        ("self_attn.*", 4 * LAYERS),
        ("layers.[1-9].*.q_proj", 1),
        ("model.layers.0.mlp.up_proj", 1),
        (["?_proj", "mlp.gate_proj"], 5 * LAYERS),
        ({"layers.0.*", "o_proj"}, 8),
    ],
)
def test_patterns_choose_modules_by_their_names(targets, expected, model):
    model.enable_lora(2, targets)
    assert len(adapted_modules(model)) == expected
    assert len(model.trainable_variables) == 2 * expected


@pytest.mark.once
@pytest.mark.parametrize(
    "targets", ["_proj", "layers.[5-9].*.q_proj", ["q_proj", "nothing.*"], "", 7, [None], [["q_proj"]]]
)
def test_patterns_that_choose_nothing_are_refused(targets, model):
    with pytest.raises(ValueError, match=r"must be among .*all-linear.*patterns"):
        model.enable_lora(2, targets)
    assert not adapted_modules(model)
    assert len(model.trainable_variables) == len(model.variables)


def outputs_of(model, inputs):
    """The logits, without a program that would have to be compiled for each adapter."""
    return ops.convert_to_numpy(ops.stop_gradient(model(inputs)))


def randomized(model, seed=1, size=0.3):
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(ops.convert_to_numpy(variable) + random.normal(0, size, variable.shape))


@pytest.mark.parametrize("use_dora", [False, True])
def test_disabled_merged_and_brought_back_exactly(use_dora, model, inputs):
    base_weights = [np.array(ops.convert_to_numpy(v)) for v in model.weights]
    base = outputs_of(model, inputs)
    model.enable_lora(3, "all-linear", alpha=6, use_dora=use_dora)
    randomized(model)
    adapted = outputs_of(model, inputs)
    assert np.abs(adapted - base).max() > 0.1

    with model.disable_adapter():
        assert model.active_adapter is None
        np.testing.assert_array_equal(outputs_of(model, inputs), base)
        with pytest.raises(ValueError, match="No adapter is in effect"):
            model.merge_adapter()
    assert model.active_adapter == "default"
    np.testing.assert_array_equal(outputs_of(model, inputs), adapted)
    model.disable_adapter()
    np.testing.assert_array_equal(outputs_of(model, inputs), base)
    model.enable_adapter()

    model.merge_adapter()
    np.testing.assert_allclose(outputs_of(model, inputs), adapted, atol=1e-4)
    for refused in (model.merge_adapter, model.disable_adapter, lambda: model.enable_lora(2, name="two")):
        with pytest.raises(ValueError, match="`unmerge_adapter"):
            refused()
    model.unmerge_adapter()
    np.testing.assert_array_equal(outputs_of(model, inputs), adapted)
    with pytest.raises(ValueError, match="No adapter is merged"):
        model.unmerge_adapter()

    model.unload_adapter()
    np.testing.assert_array_equal(outputs_of(model, inputs), base)
    assert model.adapters == []
    assert len(model.trainable_variables) == len(model.weights) == len(base_weights)
    for variable, value in zip(model.weights, base_weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


def test_what_is_merged_stays_when_it_is_unloaded(model, inputs):
    model.enable_lora(3)
    randomized(model)
    adapted = outputs_of(model, inputs)
    model.merge_adapter()
    model.unload_adapter("default")
    np.testing.assert_allclose(outputs_of(model, inputs), adapted, atol=1e-4)
    model.enable_lora(2)
    np.testing.assert_allclose(outputs_of(model, inputs), adapted, atol=1e-4)


def test_adapters_are_switched_by_name(model, inputs):
    base = outputs_of(model, inputs)
    outputs, weights = {}, {}
    for seed, (name, options) in enumerate(
        {"one": {}, "two": {"targets": "all-linear", "use_dora": True}, "three": {"targets": "layers.1.*"}}.items()
    ):
        model.enable_lora(2, name=name, **options)
        assert (model.adapters[-1], model.active_adapter) == (name, name)
        np.testing.assert_allclose(outputs_of(model, inputs), base, atol=1e-5)
        randomized(model, seed)
        outputs[name] = outputs_of(model, inputs)
        weights[name] = len(model.trainable_variables)
    assert weights == {"one": 2 * 2 * LAYERS, "two": 3 * 7 * LAYERS, "three": 2 * 7}
    for name in ("one", "three", "two", "one"):
        model.set_adapter(name)
        np.testing.assert_array_equal(outputs_of(model, inputs), outputs[name])
        assert len(model.trainable_variables) == weights[name]
    for name in ("four", None, ["one"]):
        with pytest.raises(ValueError, match="There is no adapter"):
            model.set_adapter(name)
    assert model.active_adapter == "one"
    # Only the chosen one is trained.
    kept = {v.path: np.array(ops.convert_to_numpy(v)) for v in model.non_trainable_variables}
    model.compile(keras.optimizers.SGD(0.1), weighted_metrics=None)
    model.fit(inputs, inputs["token_ids"], batch_size=2, verbose=0)
    for variable in model.non_trainable_variables:
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), kept[variable.path])
    model.unload_adapter("two")
    assert model.adapters == ["one", "three"]
    model.unload_adapter("one")
    assert (model.adapters, model.active_adapter) == (["three"], None)
    np.testing.assert_array_equal(outputs_of(model, inputs), base)
    assert not model.trainable_variables
    with pytest.raises(ValueError, match="nothing would be trained"):
        model.fit(inputs, inputs["token_ids"], batch_size=2, verbose=0)
    model.set_adapter("three")
    np.testing.assert_array_equal(outputs_of(model, inputs), outputs["three"])


def test_the_optimizer_starts_anew_only_for_other_weights(model, inputs):
    model.enable_lora(2)
    model.compile(keras.optimizers.Adam(0.01), weighted_metrics=None)
    model.fit(inputs, inputs["token_ids"], verbose=0)
    optimizer = model.optimizer
    with model.disable_adapter(), pytest.raises(ValueError, match="nothing would be trained"):
        model.fit(inputs, inputs["token_ids"], verbose=0)
    model.merge_adapter()
    with pytest.raises(ValueError, match="nothing would be trained"):
        model.train_on_batch(inputs, inputs["token_ids"])
    model.unmerge_adapter()
    assert model.optimizer is optimizer
    model.enable_lora(2, name="two")
    assert model.optimizer is not optimizer
    model.fit(inputs, inputs["token_ids"], verbose=0)
    assert (int(optimizer.iterations), int(model.optimizer.iterations)) == (1, 1)


def test_dropout_is_active_in_training_alone(model, inputs):
    model.enable_lora(3, dropout=0.5)
    randomized(model, size=1.0)
    calm = [ops.convert_to_numpy(model(inputs, training=False)) for _ in range(2)]
    np.testing.assert_array_equal(*calm)
    np.testing.assert_allclose(model.predict(inputs, verbose=0), calm[0], atol=1e-5)
    shaken = [ops.convert_to_numpy(ops.stop_gradient(model(inputs, training=True))) for _ in range(2)]
    assert np.abs(shaken[0] - shaken[1]).max() > 1e-2
    model.compile(keras.optimizers.SGD(0.0), weighted_metrics=None)
    losses = model.fit(inputs, inputs["token_ids"], epochs=3, verbose=0).history["loss"]
    assert len(set(losses)) == 3


def test_several_adapters_return_from_a_file(model, inputs, tmp_path):
    model.enable_lora(3, dropout=0.25, use_rslora=True, alpha=2)
    randomized(model)
    model.enable_lora(2, ["layers.1.mlp.*"], name="two", use_dora=True)
    randomized(model)
    outputs = {}
    for name in ("two", "default"):
        model.set_adapter(name)
        outputs[name] = outputs_of(model, inputs)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert (again.adapters, again.active_adapter) == (["default", "two"], "default")
    assert [v.path for v in again.trainable_variables] == [v.path for v in model.trainable_variables]
    for name, expected in outputs.items():
        again.set_adapter(name)
        np.testing.assert_allclose(outputs_of(again, inputs), expected, atol=1e-5)
        assert again.backbone.adapter_specs(name) == model.backbone.adapter_specs(name)
    # A merged model is saved as it was before.
    model.merge_adapter()
    model.save_weights(tmp_path / "model.weights.h5")
    again.set_adapter("default")
    randomized(again)
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(outputs_of(again, inputs), outputs["default"], atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("name", ["", "a/b", "a.b", "ä", 3, None])
def test_names_of_adapters_that_cannot_be(name, model):
    with pytest.raises(ValueError, match="`name`"):
        model.enable_lora(2, name=name)
    assert model.adapters == []


def test_a_change_that_fails_halfway_is_undone(model, monkeypatch):
    layers = list(model.backbone.linear_layers().values())
    base = [np.array(ops.convert_to_numpy(layer.weight)) for layer in layers]

    def fail(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(layers[-1], "add_adapter", fail)
        with pytest.raises(MemoryError):
            model.enable_lora(2, "all-linear")
    assert not [v for v in model.variables if "lora" in v.path]
    model.enable_lora(2, "all-linear")
    randomized(model)
    with monkeypatch.context() as patch:
        patch.setattr(layers[-1], "merge", fail)
        with pytest.raises(MemoryError):
            model.merge_adapter()
    for layer, weight in zip(layers, base, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(layer.weight), weight)
    model.merge_adapter()
