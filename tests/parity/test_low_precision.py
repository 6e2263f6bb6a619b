"""Half precision against the float32 truth of the same rounded weights, with transformers' own run as the yardstick."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

CONFIGS = {
    "two key heads": ({}, 0.05, 0),
    "scaling of 27B": ({"hidden_size": 96, "query_pre_attn_scalar": 24, "num_hidden_layers": 4}, 0.1, 1),
    "one key head": ({"num_key_value_heads": 1, "intermediate_size": 112}, 0.08, 2),
}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
# Single errors are random: over 8 · 24 · 97 logits their mean square is not.
ROWS, LENGTH = 8, 24


def rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype="float64"))))


CASES = [(config, policy) for config in CONFIGS for policy in ("bfloat16", "float16")]
CASES += [("two key heads", "mixed_bfloat16"), ("two key heads", "mixed_float16")]


@pytest.mark.parametrize(("config", "policy"), CASES)
def test_error_is_at_most_that_of_transformers(config, policy, reference, ours, logits_of):
    changes, deviation, seed = CONFIGS[config]
    dtype = policy.removeprefix("mixed_")
    half = reference.make({**CAPS, **changes}, seed, deviation, dtype=getattr(torch, dtype))
    ids = reference.ids(ROWS, LENGTH, seed=seed)
    truth = reference.logits(copy.deepcopy(half).float(), ids)
    theirs = rms(reference.logits(half, ids) - truth)
    # The yardstick is one: half precision shows, and does not drown the logits.
    assert 1e-5 < theirs / rms(truth) < 0.1

    model = ours(half, dtype=policy)
    assert model.backbone.compute_dtype == dtype
    error = rms(logits_of(model, ids) - truth)
    assert error <= 1.2 * theirs


def test_a_half_precision_checkpoint_keeps_its_dtype(reference, ours):
    model = ours(reference.make(dtype=torch.bfloat16))
    assert {v.dtype for v in model.weights} == {"bfloat16"}
