"""Keras' optimizers with the loss that makes no logits: accumulation, clipping, schedules; all weights, or some."""

from __future__ import annotations

import itertools

import keras
import numpy as np
import pytest
from keras import ops

from gemma2_keras import TokenDataset, adamw
from gemma2_keras.errors import InputError
from tests.training import small

random = np.random.default_rng(0)
IDS = random.integers(1, small.VOCABULARY, (4, 8)).astype("int32")
# Ids that are read and predicted, that are read alone, and that are neither.
IDS[IDS >= 25] = 24
IDS[0, 0] = 27
X = {"token_ids": IDS[:, :-1], "padding_mask": np.ones((4, 7), "int32")}
Y = IDS[:, 1:]


def numpy_of(variables):
    return [ops.convert_to_numpy(v).astype("float64") for v in variables]


def trained(optimizer, batch_size=4):
    """All weights before and after an epoch, and the model."""
    model = small.model(lora=False, dropout=0.0, optimizer=optimizer)
    random = np.random.default_rng(3)
    for variable in model.backbone.weights:
        variable.assign(random.normal(0, 0.3, variable.shape))
    before = numpy_of(model.trainable_variables)
    model.fit(X, Y, batch_size=batch_size, shuffle=False, verbose=0)
    return before, numpy_of(model.trainable_variables), model


@pytest.fixture(scope="module")
def whole_batch():
    """One step of plain descent."""
    return trained(keras.optimizers.SGD(1.0))


def length(before, after):
    return np.sqrt(sum(np.square(new - old).sum() for old, new in zip(before, after, strict=True)))


def test_accumulated_halves_are_the_whole_batch(whole_batch):
    """Each half has as many tokens."""
    _, found, _ = trained(keras.optimizers.SGD(1.0, gradient_accumulation_steps=2), batch_size=2)
    for mine, theirs in zip(found, whole_batch[1], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_update(whole_batch):
    before, after, _ = trained(keras.optimizers.SGD(1.0, global_clipnorm=0.01))
    unbounded = length(*whole_batch[:2])
    assert unbounded > 0.1
    assert length(before, after) == pytest.approx(0.01, rel=1e-3)
    # Shorter, in the same direction.
    for old, mine, theirs in zip(before, after, whole_batch[1], strict=True):
        np.testing.assert_allclose((mine - old) * unbounded / 0.01, theirs - old, rtol=1e-2, atol=1e-3)


@pytest.mark.once
def test_rate_rises_and_falls():
    config = adamw(small.data(20), epochs=2, learning_rate=1e-2, warmup=0.2, end=0.1).get_config()
    schedule = keras.optimizers.schedules.deserialize(config["learning_rate"])
    rates = [float(schedule(step)) for step in range(21)]
    assert rates[:5] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2], rel=1e-5)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rates[12] == pytest.approx(1e-2 * (0.9 * 0.5 + 0.1), rel=1e-5)
    assert rates[20] == pytest.approx(1e-3, rel=1e-5)


@pytest.mark.once
def test_no_warm_up():
    schedule = adamw(small.data(), learning_rate=1e-2, warmup=0.0).get_config()["learning_rate"]
    assert float(keras.optimizers.schedules.deserialize(schedule)(0)) == pytest.approx(1e-2)


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("warmup", None),
        ("end", 1.5),
        ("epochs", 0),
        ("learning_rate", -1),
        ("learning_rate", True),
        ("learning_rate", float("nan")),
    ],
)
def test_bad_numbers_are_refused(name, value):
    with pytest.raises(InputError, match=f"`{name}` must be .*; given {value}"):
        adamw(small.data(), **{name: value})


def test_all_weights_are_trained_and_the_table_from_both_ends(whole_batch):
    before, after, model = whole_batch
    for variable, old, new in zip(model.trainable_variables, before, after, strict=True):
        assert np.abs(new - old).max() > 1e-6, variable.path
    (index,) = [i for i, v in enumerate(model.trainable_variables) if v is model.backbone.token_embedding.embeddings]
    table, step = before[index], before[index] - after[index]
    for variable, old in zip(model.trainable_variables, before, strict=True):
        variable.assign(old)
    states = ops.convert_to_numpy(model.backbone(X)).reshape(-1, 24).astype("float64")
    # The gradient that comes through the output alone, of capped logits.
    cap = model.backbone.config.final_logit_soft_cap
    capped = cap * np.tanh(states @ table.T / cap)
    shares = np.exp(capped - capped.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    errors = (shares - np.eye(small.VOCABULARY)[Y.reshape(-1)]) * (1 - np.square(capped / cap)) / Y.size
    output_end = errors.T @ states
    read = np.isin(np.arange(small.VOCABULARY), X["token_ids"])
    assert 0 < read.sum() < small.VOCABULARY
    np.testing.assert_allclose(step[~read], output_end[~read], rtol=1e-4, atol=1e-6)
    assert np.abs(output_end[~read]).max(-1).min() > 1e-6
    assert np.abs(step - output_end)[read].max(-1).min() > 1e-4


def test_frozen_embedding_stays():
    model = small.model(lora=False, dropout=0.0)
    table = model.backbone.token_embedding.embeddings
    model.backbone.token_embedding.trainable = False
    small.compile_small(model, keras.optimizers.Adam(0.01))
    old, before = ops.convert_to_numpy(table).copy(), numpy_of(model.trainable_variables)
    model.fit(X, Y, batch_size=4, verbose=0)
    np.testing.assert_array_equal(ops.convert_to_numpy(table), old)
    assert all(tuple(v.shape) != tuple(table.shape) for v in model.optimizer.variables)
    for variable, value in zip(model.trainable_variables, before, strict=True):
        assert np.abs(ops.convert_to_numpy(variable) - value).max() > 1e-6, variable.path


def test_long_text_is_learned_with_all_weights():
    """Continued pre-training: consecutive pieces of one text, its loss far below that of chance."""
    text = np.tile(np.arange(1, 9, dtype="int32"), 65)
    pieces = np.stack([text[i * 16 : i * 16 + 17] for i in range(32)])
    x = {"token_ids": pieces[:, :-1], "padding_mask": np.ones((32, 16), "int32")}
    data = TokenDataset(x, pieces[:, 1:], np.ones((32, 16), "float32"), batch_size=4)
    optimizer = adamw(data, epochs=5, learning_rate=0.03, end=0.1, global_clipnorm=1.0)
    model = small.model(lora=False, dropout=0.0, optimizer=optimizer)
    losses = model.fit(data, epochs=5, shuffle=False, verbose=0).history["loss"]
    assert losses[0] > 2.0
    assert losses[-1] < 0.5
    assert int(optimizer.iterations) == 40
    assert float(optimizer.learning_rate) == pytest.approx(0.003, rel=1e-3)
