"""Batches of tokens, in an order that can be found again."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2_keras import TokenDataset
from gemma2_keras.errors import InputError
from tests.training import small


def labels(data):
    return [data[i][1] for i in range(data.num_batches)]


@pytest.mark.once
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 9), st.integers(0, 3), st.booleans(), st.data())
def test_rest_of_an_epoch_is_that_of_the_whole(examples, batch_size, seed, epoch, shuffle, draw):
    made = small.data(examples, batch_size, shuffle=shuffle)
    made.seed = seed
    made.start_at(epoch)
    whole, tokens = labels(made), [made.num_tokens(i) for i in range(made.num_batches)]
    assert len(whole) == made.batches_per_epoch
    assert sum(tokens) == np.count_nonzero(made.x["padding_mask"])
    # Each example counts once; what fills the last batch has no weight.
    assert sum(made[i][2].any(-1).sum() for i in range(made.num_batches)) == examples
    step = draw.draw(st.integers(0, made.batches_per_epoch))
    made.start_at(epoch + 1)
    made.start_at(epoch, step)
    assert (made.first_step, made.num_batches) == (step, made.batches_per_epoch - step)
    np.testing.assert_array_equal(labels(made), whole[step:])
    assert [made.num_tokens(i) for i in range(made.num_batches)] == tokens[step:]


@pytest.mark.once
def test_epochs_differ_and_come_back():
    data = small.data(20)
    first = labels(data)
    data.on_epoch_end()
    assert any((a != b).any() for a, b in zip(first, labels(data), strict=True))
    data.start_at(0)
    np.testing.assert_array_equal(labels(data), first)


@pytest.mark.once
def test_digest_tells_data_apart():
    digests = {small.data(seed=seed).digest for seed in range(3)} | {small.data(8).digest}
    assert len(digests) == 4
    assert small.data().digest == small.data(batch_size=3).digest
    for name in ("padding_mask", "token_ids"):
        data = small.data()
        data.x[name] = data.x[name].copy()
        data.x[name][8, 6] += 1
        assert data.digest not in digests
    data = small.data()
    data.sample_weight = data.sample_weight.astype("float64")
    assert data.digest not in digests


@pytest.mark.once
@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
def test_bad_batch_size_is_refused(batch_size):
    with pytest.raises(InputError, match="`batch_size` must be a whole number of at least 1"):
        small.data(batch_size=batch_size)


@pytest.mark.once
def test_examples_must_be_there_and_as_many():
    made = small.data()
    with pytest.raises(InputError, match="the same number of examples, at least 1; given 8 and 9"):
        TokenDataset(made.x, made.y[1:], made.sample_weight)
    with pytest.raises(InputError, match="at least 1; given 0"):
        small.data(0)


def test_fit_takes_batches_for_steps(adapters):
    """Keras takes `num_batches`, not the length, which is that of the examples."""
    steps = []
    note = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: steps.append(batch))
    data = small.data()
    assert len(data) == 9
    adapters.fresh().fit(data, epochs=2, callbacks=[note], shuffle=False, verbose=0)
    assert steps == [0, 1, 2, 3, 4] * 2
