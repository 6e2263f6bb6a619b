"""The states of given tokens, a stretch at a time, against the whole model."""

from __future__ import annotations

import numpy as np
import pytest
from keras import ops

from gemma2_keras.generation import engine, reading
from gemma2_keras.ops import cross_entropy
from tests.preprocessing import tiny

LENGTHS = [3, 40, 0, 16, 1, 17, 9, 7]


@pytest.fixture(scope="module")
def model():
    made = tiny.causal_lm(num_layers=2)
    random = np.random.default_rng(1)
    for variable in made.weights:
        variable.assign(random.normal(1.0 if "norm" in variable.path else 0.0, 0.3, variable.shape))
    return made


@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("at_once", [8, 1024])
def test_states_are_those_of_each_row_alone(model, monkeypatch, chunk, at_once):
    monkeypatch.setattr(engine, "CHUNK", chunk)
    monkeypatch.setattr(cross_entropy, "_BLOCK", at_once * tiny.VOCABULARY_SIZE)
    random = np.random.default_rng(2)
    rows = [random.integers(0, tiny.VOCABULARY_SIZE, length).tolist() for length in LENGTHS]
    found = {}
    for states, members, places in reading.read(model.programs, rows):
        assert len(members) <= states.shape[0] <= at_once
        for state, row, place in zip(ops.convert_to_numpy(states), members, places, strict=False):
            assert (row, place) not in found
            found[row, place] = state
    assert {*found} == {(row, place) for row, length in enumerate(LENGTHS) for place in range(length)}
    width = max(LENGTHS)
    token_ids = np.array([row + [0] * (width - len(row)) for row in rows], "int32")
    mask = np.arange(width) < np.array(LENGTHS)[:, None]
    expected = ops.convert_to_numpy(
        ops.stop_gradient(model.backbone({"token_ids": token_ids, "padding_mask": mask.astype("int32")}))
    )
    for (row, place), state in found.items():
        np.testing.assert_allclose(state, expected[row, place], rtol=1e-4, atol=1e-4)


def test_no_row_gives_nothing(model):
    assert list(reading.read(model.programs, [])) == []
    assert list(reading.read(model.programs, [[]])) == []
