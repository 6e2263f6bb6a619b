"""Layers without what Keras does around them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import ops

from gemma2_keras.layers.feed_forward import FeedForward
from gemma2_keras.layers.lean import lean
from gemma2_keras.layers.linear import Linear

X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype("float32")


@pytest.fixture
def calls(monkeypatch):
    """How often Keras is asked to call a layer."""
    count = []
    original = keras.layers.Layer.__call__

    def counting(self, *args, **kwargs):
        count.append(self.name)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(keras.layers.Layer, "__call__", counting)
    return count


def test_a_lean_layer_gives_the_same(calls):
    layer = FeedForward(5)
    expected = ops.convert_to_numpy(layer(X))
    assert len(calls) == 4
    with lean(layer):
        found = ops.convert_to_numpy(layer(ops.convert_to_tensor(X)))
    assert len(calls) == 4
    np.testing.assert_array_equal(found, expected)
    layer(X)
    assert len(calls) == 8


def test_keras_casts_where_there_is_something_to_cast(calls):
    layer = FeedForward(5, dtype="mixed_bfloat16")
    layer(X)
    with lean(layer):
        y = layer(X)
    assert len(calls) == 8
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"


def test_an_error_ends_it(calls):
    layer = Linear(3)
    layer(X)
    with pytest.raises(RuntimeError, match="enough"), lean(layer):
        raise RuntimeError("enough")
    layer(X)
    assert len(calls) == 2
