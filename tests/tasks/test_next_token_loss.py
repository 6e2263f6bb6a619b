"""Training without logits, and with each branch computed again, against plain training."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM, NextTokenLoss
from gemma2_keras.errors import InputError
from gemma2_keras.layers.embedding import TokenEmbedding

ACCURACY = ["sparse_categorical_accuracy"]
random = np.random.default_rng(0)
IDS = random.integers(0, 31, (5, 8)).astype("int32")
X = {"token_ids": IDS[:, :-1], "padding_mask": np.ones((5, 7), "int32")}
Y = IDS[:, 1:]
WEIGHT = (random.random((5, 7)) < 0.6).astype("float32")


def make(dtype="float32", dropout=0.0):
    keras.utils.set_random_seed(1)
    backbone = Gemma2Backbone(
        vocabulary_size=31,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=24,
        intermediate_dim=20,
        head_dim=8,
        sliding_window_size=3,
        final_logit_soft_cap=2.0,
        dropout=dropout,
        dtype=dtype,
    )
    numbers = np.random.default_rng(3)
    for variable in backbone.trainable_variables:
        variable.assign(numbers.normal(0, 0.3, variable.shape))
    return Gemma2CausalLM(backbone)


def trained(lora, loss="auto", dtype="float32", weight=WEIGHT, **options):
    """History, evaluation and trained weights of three steps."""
    model = make(dtype)
    if lora:
        model.enable_lora(2)
    model.compile(keras.optimizers.SGD(0.5), loss, **options)
    history = model.fit(X, Y, sample_weight=weight, batch_size=5, epochs=3, verbose=0, shuffle=False).history
    results = model.evaluate(X, Y, sample_weight=weight, batch_size=5, verbose=0, return_dict=True)
    return history, results, [ops.convert_to_numpy(v) for v in model.trainable_variables]


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("weight", [WEIGHT, None])
def test_training_is_that_on_all_logits(lora, weight):
    found, expected = (
        trained(lora, NextTokenLoss(0.1, 1e-2), weight=weight, weighted_metrics=metrics)
        for metrics in ("auto", ACCURACY)
    )
    for mine, theirs in zip(found[:2], expected[:2], strict=True):
        assert {*mine} == {*theirs, "perplexity"}
        for name in theirs:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(found[2], expected[2], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_automatic_loss_is_the_mean_surprise_of_tokens_that_count():
    history, results, _ = trained(lora=True)
    logits = ops.convert_to_numpy(make()(X)).astype("float64")
    log_shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    surprise = -np.take_along_axis(log_shares, Y[..., None], -1)[..., 0]
    assert history["loss"][0] == pytest.approx((surprise * WEIGHT).sum() / WEIGHT.sum(), rel=1e-5)
    assert history["perplexity"] == pytest.approx(np.exp(history["loss"]), rel=1e-4)
    assert results["perplexity"] == pytest.approx(np.exp(results["loss"]), rel=1e-4)


@pytest.mark.parametrize("lora", [True, False])
def test_remat_changes_nothing(lora):
    found, expected = (trained(lora, remat=remat) for remat in (True, False))
    np.testing.assert_allclose(found[0]["loss"], expected[0]["loss"], rtol=1e-6)
    for mine, theirs in zip(found[2], expected[2], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_remat_keeps_dropout():
    def losses(remat):
        model = make(dropout=0.4)
        model.compile(keras.optimizers.SGD(0.1), remat=remat)
        return model.fit(X, Y, batch_size=5, epochs=3, verbose=0, shuffle=False).history["loss"]

    keras.utils.set_random_seed(1)
    expected = losses(False)
    keras.utils.set_random_seed(1)
    np.testing.assert_allclose(losses(True), expected, rtol=1e-4)


def test_remat_with_dropout_of_adapters_is_refused():
    model = make()
    model.enable_lora(2, dropout=0.5)
    model.compile("sgd", remat=True)
    with pytest.raises(ValueError, match="`remat=True` and adapters with dropout do not go together"):
        model.fit(X, Y, verbose=0)
    model.compile("sgd")
    model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16", "mixed_float16"])
def test_low_precision_trains(dtype):
    history, _, _ = trained(lora=True, dtype=dtype)
    truth, _, _ = trained(lora=True)
    np.testing.assert_allclose(history["loss"], truth["loss"], rtol=0.03)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_too_coarse_to_train_are_warned_of(dtype):
    model = make(dtype=dtype)
    model.compile("sgd")
    with pytest.warns(UserWarning, match=f"Weights of {dtype} are to be trained.*mixed_bfloat16") as caught:
        model.fit(X, Y, verbose=0)
    assert caught[0].filename == __file__


def test_logits_are_not_made_in_a_step(monkeypatch):
    model = make()
    model.compile("sgd")
    # Keras asks once, without numbers, what the model gives.
    model.evaluate(X, Y, verbose=0)
    model.test_function = None

    def refuse(self, inputs, reverse=False):
        assert not reverse, "logits were made"
        return original(self, inputs)

    original = TokenEmbedding.call
    monkeypatch.setattr(TokenEmbedding, "call", refuse)
    model.fit(X, Y, verbose=0)
    model.evaluate(X, Y, verbose=0)


def test_outside_a_step_the_model_gives_logits():
    model = make()
    model.compile("sgd")
    model.fit(X, Y, verbose=0)
    assert model.predict(X, verbose=0).shape == (5, 7, 31)
    assert tuple(model(X).shape) == (5, 7, 31)


def test_a_loss_of_the_users_own_gets_logits():
    seen = []

    def loss(y_true, y_pred):
        seen.append(tuple(y_pred.shape)[-1])
        return keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True)

    model = make()
    model.compile("sgd", loss, weighted_metrics=None)
    model.fit(X, Y, verbose=0)
    assert set(seen) == {31}


def test_no_token_that_counts_is_no_loss():
    model = make()
    model.compile("sgd")
    history = model.fit(X, Y, sample_weight=WEIGHT * 0, verbose=0).history
    assert history["loss"] == [0.0]
    assert history["perplexity"] == [1.0]


def test_weights_of_examples_count_for_their_tokens():
    each = np.arange(5.0, dtype="float32")
    expected = trained(lora=True, weight=np.repeat(each[:, None], 7, 1))
    for weight in (each, each[:, None]):
        found = trained(lora=True, weight=weight)
        for name in expected[0]:
            np.testing.assert_allclose(found[0][name], expected[0][name], rtol=1e-6)
            np.testing.assert_allclose(found[1][name], expected[1][name], rtol=1e-6)


@pytest.mark.parametrize(
    ("y", "weight", "message"),
    [
        (Y[:, :1], None, "`y` must have the shape of the token ids"),
        (Y[:, :5], None, "`y` must have the shape of the token ids"),
        (Y[:, 0], None, "`y` must have the shape of the token ids"),
        (np.eye(31, dtype="int32")[Y], None, "`y` must have the shape of the token ids"),
        (Y + 0.5, None, "`y` must be whole numbers"),
        (Y > 3, None, "`y` must be whole numbers"),
        (None, None, "`y` is missing"),
        (Y, WEIGHT[:, :3], "`sample_weight` must have the shape of the token ids"),
        (Y, WEIGHT[..., None], "`sample_weight` must have the shape of the token ids"),
    ],
)
def test_labels_and_weights_that_do_not_fit_are_refused(y, weight, message):
    model = make()
    model.compile("sgd")
    for method in (model.fit, model.evaluate):
        with pytest.raises(InputError, match=message):
            method(X, y, sample_weight=weight, verbose=0)


def test_an_earlier_compile_leaves_nothing_behind():
    model = make()
    model.compile("sgd", metrics=ACCURACY, weighted_metrics=ACCURACY)
    model.fit(X, Y, verbose=0)
    model.compile("sgd", weighted_metrics=None)
    assert {*model.fit(X, Y, verbose=0).history} == {"loss"}


def test_loss_weights_are_heeded():
    plain, doubled = make(), make()
    plain.compile(keras.optimizers.SGD(0.0))
    doubled.compile(keras.optimizers.SGD(0.0), loss_weights=[2.0])
    found, expected = (model.fit(X, Y, batch_size=5, verbose=0).history["loss"][0] for model in (doubled, plain))
    assert found == pytest.approx(2 * expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "value"), [("label_smoothing", 1.0), ("label_smoothing", -0.1), ("z_loss", float("inf")), ("z_loss", "1")]
)
def test_bad_terms_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a number of at least 0"):
        NextTokenLoss(**{name: value})


def test_bad_remat_is_refused():
    with pytest.raises(ValueError, match="`remat` must be True or False; given 1"):
        make().compile("sgd", remat=1)


def test_keras_file_keeps_how_it_was_compiled(tmp_path):
    model = make()
    model.compile(keras.optimizers.SGD(0.5), NextTokenLoss(0.1, 1e-3), remat=True)
    model.fit(X, Y, batch_size=5, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    found, expected = (m.fit(X, Y, batch_size=5, epochs=2, verbose=0, shuffle=False).history for m in (again, model))
    assert again.backbone.transformer_layers[1].remat
    assert {*found} == {"loss", "perplexity", "sparse_categorical_accuracy"}
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize("good", [0, 1])
def test_a_step_that_fails_loses_nothing(good):
    model = make()
    model.compile(keras.optimizers.SGD(0.5))
    wrong = Y[:, :5]

    def batches():
        for _ in range(good):
            yield X, Y, WEIGHT
        yield X, wrong, WEIGHT

    # TensorFlow may notice it in a program that takes any length.
    with pytest.raises(Exception, match=r"(?i)shape"):
        model.fit(batches(), verbose=0, shuffle=False)
    other = make()
    other.compile(keras.optimizers.SGD(0.5))
    for _ in range(good):
        other.train_on_batch(X, Y, WEIGHT)
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    model.fit(X, Y, sample_weight=WEIGHT, verbose=0)
