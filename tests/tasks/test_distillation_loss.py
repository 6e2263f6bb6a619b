"""Training a student on a teacher's distributions."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from gemma2_keras import DistillationLoss, NextTokenLoss, TokenDataset
from gemma2_keras.errors import InputError
from gemma2_keras.layers.embedding import TokenEmbedding
from tests.tasks.test_next_token_loss import ACCURACY, WEIGHT, X, Y, make

WORDS = 4
random = np.random.default_rng(5)
TARGETS = {
    "labels": Y,
    "teacher_ids": random.permuted(np.tile(np.arange(31, dtype="int32"), (5, 7, 1)), axis=-1)[..., :WORDS],
    "teacher_shares": random.dirichlet(np.ones(31), (5, 7))[..., :WORDS].astype("float16"),
}


def changed(name, value):
    return {**TARGETS, name: value}


def with_share(value):
    shares = TARGETS["teacher_shares"].copy()
    shares[1, 2, 3] = value
    return changed("teacher_shares", shares)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def plain_losses(logits, weight, temperature):
    """(B, T) losses by the formula, in float64."""
    logits = logits.astype("float64")
    shares = np.zeros(logits.shape)
    np.put_along_axis(shares, TARGETS["teacher_ids"], TARGETS["teacher_shares"].astype("float64"), -1)
    shares = shares ** (1 / temperature)
    shares /= shares.sum(-1, keepdims=True)
    soft = -(temperature**2) * (shares * log_softmax(logits / temperature)).sum(-1)
    hard = -np.take_along_axis(log_softmax(logits), Y[..., None], -1)[..., 0]
    return (1 - weight) * hard + weight * soft


def data(y=TARGETS, weight=WEIGHT):
    return TokenDataset(X, y, weight, batch_size=5, shuffle=False)


def trained(lora, loss, **options):
    """History and trained weights of three steps."""
    model = make()
    if lora:
        model.enable_lora(2)
    model.compile(keras.optimizers.SGD(0.5), loss, **options)
    history = model.fit(data(), epochs=3, verbose=0, shuffle=False).history
    return history, [ops.convert_to_numpy(v) for v in model.trainable_variables]


def test_training_of_adapters_is_that_on_all_logits():
    loss = DistillationLoss(0.7, 2.0, 0.1, 1e-2)
    found, expected = (trained(True, loss, weighted_metrics=metrics) for metrics in ("auto", ACCURACY))
    assert {*found[0]} == {*expected[0], "perplexity"}
    for name in expected[0]:
        np.testing.assert_allclose(found[0][name], expected[0][name], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)


def test_training_of_all_weights_minimises_the_formula():
    history, _ = trained(False, DistillationLoss())
    logits = ops.convert_to_numpy(make()(X))
    # The perplexity is of the labels.
    loss, surprise = ((plain_losses(logits, weight, 1.0) * WEIGHT).sum() / WEIGHT.sum() for weight in (1.0, 0.0))
    assert history["loss"][0] == pytest.approx(loss, rel=1e-5)
    assert np.log(history["perplexity"][0]) == pytest.approx(surprise, rel=1e-4)
    assert history["loss"][2] < history["loss"][0]


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (1.0, 1.0), (0.4, 1.0), (0.4, 3.0)])
def test_loss_is_the_formula(weight, temperature):
    logits = np.random.default_rng(6).normal(size=(5, 7, 31)).astype("float32") * 2
    expected = plain_losses(logits, weight, temperature)
    found = DistillationLoss(weight, temperature, reduction="none")(TARGETS, logits)
    np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=1e-5)
    mean = float(DistillationLoss(weight, temperature)(TARGETS, logits, WEIGHT))
    assert mean == pytest.approx((expected * WEIGHT).sum() / WEIGHT.sum(), rel=1e-5)
    if weight == 0.0:
        assert mean == pytest.approx(float(NextTokenLoss()(Y, logits, WEIGHT)), rel=1e-6)


def test_logits_are_not_made_in_a_step(monkeypatch):
    model = make()
    model.compile("sgd", DistillationLoss(0.5, 2.0))

    def refuse(self, inputs, reverse=False):
        # Keras asks once, without numbers, what the model gives.
        assert not (reverse and model._in_step), "logits were made"
        return original(self, inputs, reverse)

    original = TokenEmbedding.call
    monkeypatch.setattr(TokenEmbedding, "call", refuse)
    model.fit(X, TARGETS, verbose=0)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (Y, "`DistillationLoss` needs a teacher's distributions beside the labels"),
        ({"labels": Y}, "must have labels, teacher_ids, teacher_shares"),
        (changed("teacher_ids", TARGETS["teacher_ids"][:, :5]), "must have shape"),
        (changed("teacher_ids", TARGETS["teacher_ids"][..., :3]), "must have shape"),
        (changed("teacher_shares", TARGETS["teacher_shares"][..., 0]), "must have shape"),
        (changed("teacher_ids", TARGETS["teacher_ids"] + 0.5), "must be whole numbers and `teacher_shares` floats"),
        (changed("teacher_shares", TARGETS["teacher_ids"]), "must be whole numbers and `teacher_shares` floats"),
        (changed("teacher_ids", TARGETS["teacher_ids"] + 1), "`teacher_ids` must lie between 0 and 30; given 31"),
        (changed("labels", Y + 31), "`labels` must lie between 0 and 30"),
        (changed("labels", Y[:, 0]), "must have shape"),
        (changed("labels", Y[:, :1]), "must have shape"),
        (with_share(np.nan), r"`teacher_shares` must be finite numbers of at least 0.*nan at \(1, 2, 3\)"),
        (with_share(-0.1), r"`teacher_shares` must be finite numbers of at least 0.* at \(1, 2, 3\)"),
        (changed("teacher_shares", TARGETS["teacher_shares"] * 0), r"are all 0 at \(0, 0\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused(y, message):
    model = make()
    model.compile("sgd", DistillationLoss())
    with pytest.raises(InputError, match=message):
        model.fit(X, y, verbose=0)


def test_arrays_train_and_say_where_weights_go():
    model = make()
    model.compile(keras.optimizers.SGD(0.5), DistillationLoss())
    with pytest.raises(InputError, match=r"`gemma2_keras.TokenDataset\(x, y, sample_weight\)`"):
        model.fit(X, TARGETS, sample_weight=WEIGHT, verbose=0)
    expected = plain_losses(ops.convert_to_numpy(model(X)), 1.0, 1.0).mean()
    assert model.evaluate(X, TARGETS, verbose=0)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"weighted_metrics": ACCURACY}, {"loss": NextTokenLoss(0.1)}])
def test_a_teacher_that_the_loss_would_not_read_is_refused(options):
    model = make()
    model.compile("sgd", **options)
    with pytest.raises(InputError, match=r"`loss=gemma2_keras.DistillationLoss\(\)`"):
        model.evaluate(X, TARGETS, verbose=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.5}, "`weight` must be a number from 0 to 1; given 1.5"),
        ({"weight": -0.1}, "`weight` must be a number from 0 to 1"),
        ({"weight": True}, "`weight` must be a number from 0 to 1"),
        ({"temperature": 0}, "`temperature` must be a number above 0; given 0"),
        ({"temperature": float("nan")}, "`temperature` must be a number above 0"),
        ({"z_loss": -1.0}, "`z_loss` must be a number of at least 0"),
    ],
)
def test_bad_terms_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(**options)


def test_another_weight_on_the_loss_is_refused():
    with pytest.raises(ValueError, match="`loss_weights` has no place beside `DistillationLoss`"):
        make().compile("sgd", DistillationLoss(), loss_weights=[2.0])


def test_single_batches_are_trained_on():
    model = make()
    model.compile(keras.optimizers.SGD(0.5), DistillationLoss())
    losses = plain_losses(ops.convert_to_numpy(model(X)), 1.0, 1.0)
    expected = (losses * WEIGHT).sum() / WEIGHT.sum()
    assert model.test_on_batch(X, TARGETS, WEIGHT, return_dict=True)["loss"] == pytest.approx(expected, rel=1e-5)
    assert model.train_on_batch(X, TARGETS, WEIGHT, return_dict=True)["loss"] == pytest.approx(expected, rel=1e-5)
    assert model.train_on_batch(X, TARGETS, WEIGHT, return_dict=True)["loss"] < expected


def test_keras_file_keeps_the_loss(tmp_path):
    model = make()
    model.compile(keras.optimizers.SGD(0.5), DistillationLoss(0.7, 2.0, 0.1, 1e-3))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert type(again.loss) is DistillationLoss
    assert again.loss.get_config() == model.loss.get_config()


def test_keras_own_distiller_takes_the_models():
    """On all logits at once: for vocabularies and batches whose logits find room in memory."""
    teacher, student = make(), make()
    numbers = np.random.default_rng(8)
    for variable in student.trainable_variables:
        variable.assign(numbers.normal(0, 0.3, variable.shape))

    def divergence():
        ours, theirs = (log_softmax(ops.convert_to_numpy(model(X)).astype("float64")) for model in (student, teacher))
        return (np.exp(theirs) * (theirs - ours)).sum(-1).mean()

    before, kept = divergence(), [ops.convert_to_numpy(v).copy() for v in teacher.weights]
    distiller = keras.distillation.Distiller(
        teacher,
        student,
        # By its name alone, "kl_divergence", Keras compares the logits as if they were probabilities.
        keras.distillation.LogitsDistillation(temperature=1.0, loss=keras.losses.KLDivergence()),
        student_loss_weight=0.0,
    )
    distiller.compile(keras.optimizers.Adam(0.02), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = distiller.fit(X, Y, batch_size=5, epochs=20, verbose=0).history["total_loss"]
    assert losses[0] == pytest.approx(before, rel=1e-3)
    assert divergence() < before / 3
    for value, variable in zip(kept, teacher.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
