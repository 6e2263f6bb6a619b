from __future__ import annotations

import numpy as np
import pytest

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM

LENGTH = 19  # more than three windows of 5

CONFIGS = {
    "base": {},
    "scaling of 27B": {"hidden_size": 72, "query_pre_attn_scalar": 18, "head_dim": 8, "num_hidden_layers": 5},
    "one key head": {"num_key_value_heads": 1},
    "as many key heads as heads": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "hidden_size": 33,
        "head_dim": 10,
    },
    "window of 1": {"sliding_window": 1},
    "window beyond the sequence": {"sliding_window": 64},
    "no attention cap": {"attn_logit_softcapping": None},
    "no final cap": {"final_logit_softcapping": None},
    "caps of the paper": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "another rope base and epsilon": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rms_norm_eps": 1e-2,
    },
    "one layer": {"num_hidden_layers": 1},
}
# Rows without padding, with padding on the left, on the right, on both sides, and of a single token.
PADDING_MASK = np.array(
    [
        [1] * 19,
        [0] * 7 + [1] * 12,
        [1] * 12 + [0] * 7,
        [0] * 3 + [1] * 12 + [0] * 4,
        [0] * 18 + [1],
    ]
)


@pytest.fixture(scope="module")
def base(reference, ours):
    theirs = reference.make()
    return theirs, ours(theirs)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_those_of_transformers(changes, reference, ours, logits_of):
    theirs = reference.make(changes)
    ids = reference.ids(len(PADDING_MASK), LENGTH)
    expected = reference.logits(theirs, ids, PADDING_MASK)
    found = logits_of(ours(theirs), ids, PADDING_MASK)

    assert found.dtype == "float32"
    real = PADDING_MASK.astype(bool)
    error = np.abs(found - expected)[real].max()
    assert error <= 1e-4


@pytest.mark.once
def test_the_weights_reach_beyond_both_caps(reference, monkeypatch):
    theirs = reference.make()
    ids = reference.ids(4, LENGTH)
    assert np.abs(reference.logits(theirs, ids)).max() > 0.9 * theirs.config.final_logit_softcapping
    assert reference.largest_score(theirs, ids, monkeypatch) > 1.2 * theirs.config.attn_logit_softcapping


@pytest.mark.parametrize(
    "change",
    [
        {"attention_logit_soft_cap": None},
        {"final_logit_soft_cap": None},
        {"sliding_window_size": 128},
        {"sliding_window_size": 6},
        {"query_pre_attention_scalar": 16},
        {"rope_max_wavelength": 9_000.0},
        {"layer_norm_epsilon": 1e-2},
    ],
    ids=str,
)
def test_parity_would_fail_if_our_model_missed(change, base, reference, logits_of):
    theirs, model = base
    wrong = Gemma2Backbone(**{**model.backbone.config.to_dict(), **change})
    wrong.set_weights(model.backbone.get_weights())
    ids = reference.ids(len(PADDING_MASK), LENGTH)
    assert np.abs(logits_of(Gemma2CausalLM(wrong), ids) - reference.logits(theirs, ids)).max() > 1e-2


def test_padding_leaves_rows_as_they_are_alone(base, reference, logits_of):
    theirs, model = base
    ids = reference.ids(len(PADDING_MASK), LENGTH)
    padded = logits_of(model, ids, PADDING_MASK)
    for row, mask in enumerate(PADDING_MASK.astype(bool)):
        alone = ids[row : row + 1, mask]
        np.testing.assert_allclose(padded[row, mask], logits_of(model, alone)[0], atol=1e-4, rtol=0)
        np.testing.assert_allclose(padded[row, mask], reference.logits(theirs, alone)[0], atol=1e-4, rtol=0)


def test_what_stands_in_padding_does_not_matter(base, reference, logits_of):
    _, model = base
    real = PADDING_MASK.astype(bool)
    some, others = (np.where(real, reference.ids(5, LENGTH), reference.ids(5, LENGTH, seed=seed)) for seed in (1, 2))
    assert (some != others).any()
    np.testing.assert_array_equal(
        logits_of(model, some, PADDING_MASK)[real], logits_of(model, others, PADDING_MASK)[real]
    )
