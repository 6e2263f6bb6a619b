from __future__ import annotations

import numpy as np
import pytest

PROMPTS = (3, 17, 40)
STEPS = 64
LENGTH = max(PROMPTS) + STEPS


@pytest.fixture(scope="module")
def model(reference, ours):
    """One model for all weights: its loop is compiled once."""
    return ours(weights(reference, 0))


def weights(reference, seed):
    # Branches weigh more than the embedding: otherwise the tied output repeats the token that came in.
    changes = {"vocab_size": 211, "sliding_window": 8, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
    return reference.make(changes, seed, embedding_std=0.1, norm_mean=2.0)


def prompts(reference, seed):
    ids = reference.ids(len(PROMPTS), max(PROMPTS), vocabulary_size=211, seed=seed)
    return [row[:length].tolist() for row, length in zip(ids, PROMPTS, strict=True)]


def generate(model, rows, stop_token_ids=None, **kwargs):
    """Continuations of rows of tokens, up to and including the one that ended them."""
    token_ids, padding_mask = np.zeros((2, len(rows), LENGTH), "int32")
    for i, row in enumerate(rows):
        token_ids[i, : len(row)] = row
        padding_mask[i, : len(row)] = 1
    made = model.generate(
        {"token_ids": token_ids, "padding_mask": padding_mask},
        stop_token_ids=stop_token_ids,
        strip_prompt=True,
        **kwargs,
    )
    return [row[mask].tolist() for row, mask in zip(made["token_ids"], made["padding_mask"], strict=True)]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_tokens_are_those_of_transformers(seed, model, reference, ours):
    theirs = weights(reference, seed)
    model.backbone.set_weights(ours(theirs).backbone.get_weights())
    rows = prompts(reference, seed)
    expected = []
    for row in rows:
        tokens, gap = reference.greedy(theirs, row, STEPS)
        assert gap > 1e-3  # far above rounding, so that there is one right answer
        assert len(set(tokens)) >= 10
        expected.append(tokens)
    assert generate(model, rows, max_new_tokens=STEPS) == expected


def test_each_row_stops_after_its_first_stop_id(model, reference):
    rows = prompts(reference, 0)
    free = generate(model, rows, max_new_tokens=STEPS)
    # Found early in the first row, later or never in the others.
    stops = (free[0][5], free[1][30])
    ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in free]
    assert len(set(ends)) > 1
    assert min(ends) < STEPS
    assert generate(model, rows, stops, max_new_tokens=STEPS) == [
        row[:end] for row, end in zip(free, ends, strict=True)
    ]


def test_without_a_limit_each_row_fills_its_length(model, reference):
    rows = prompts(reference, 2)
    assert [len(row) for row in generate(model, rows)] == [LENGTH - length for length in PROMPTS]
