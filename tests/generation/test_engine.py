"""Prefill and decoding steps against the whole forward pass, and what the loops around them choose."""

from __future__ import annotations

import functools

import keras
import keras_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from gemma2_keras import Gemma2Backbone, Gemma2CausalLM
from gemma2_keras.generation.engine import decode_step, prefill
from gemma2_keras.generation.sampling import searches
from gemma2_keras.layers.cache import tokens_in_ring

WINDOW, VOCABULARY, STEPS = 4, 13, 6
# All calls share these shapes, so that each operation is compiled once: prompts of at most 12 tokens, and what follows.
ROOM, TOTAL = 2 * WINDOW + 4, 2 * WINDOW + 4 + STEPS


@pytest.fixture(scope="module")
def model():
    backbone = Gemma2Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=24,
        intermediate_dim=20,
        head_dim=8,
        query_pre_attention_scalar=6,
        attention_logit_soft_cap=10.0,
        sliding_window_size=WINDOW,
        context_length=TOTAL,
    )
    random = np.random.default_rng(0)
    backbone.set_weights([random.normal(0, 0.4, w.shape).astype("float32") for w in backbone.weights])
    return Gemma2CausalLM(backbone)


def tokens(rows, seed=0):
    return np.random.default_rng(seed).integers(1, VOCABULARY, (rows, TOTAL)).astype("int32")


def quick(function):
    """Compiled on JAX, where one operation after the other takes long; the weights never change here."""
    if keras.backend.backend() != "jax":
        return function
    import jax

    return jax.jit(function)


def of_rows(network):
    """What a network makes of whole rows, each padded on the right."""
    run = quick(lambda token_ids, padding_mask: network({"token_ids": token_ids, "padding_mask": padding_mask}))

    def call(rows):
        ids, mask = np.zeros((2, len(rows), TOTAL), "int32")
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return ops.convert_to_numpy(run(ids, mask))

    return call


@pytest.fixture(scope="module")
def forward(model):
    return of_rows(model)


@pytest.fixture(scope="module")
def states(model):
    return of_rows(model.backbone)


@pytest.fixture(scope="module")
def uncached(forward):
    """Logits after the prompt and after each of the tokens that follow it, from one forward pass over the row alone."""
    return lambda row, length: forward([row[: length + STEPS]])[0, length - 1 : length + STEPS]


@pytest.fixture(scope="module")
def cached(model):
    first = quick(lambda prompt, mask: prefill(model.backbone, prompt, mask, TOTAL))
    then = quick(lambda following, cache, index: decode_step(model.backbone, following, cache, index))
    return functools.partial(run_cached, first, then)


def run_cached(first, then, rows, lengths, repeat=1):
    """The same from prefill and steps over a right-aligned batch: (B, 1 + STEPS, V)."""
    prompt, mask = np.zeros((2, len(rows), ROOM), "int32")
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        prompt[i, ROOM - length :] = row[:length]
        mask[i, ROOM - length :] = 1
    logits, _, cache = first(ops.convert_to_tensor(prompt), ops.convert_to_tensor(mask))
    found = [ops.convert_to_numpy(logits)]
    for step in range(STEPS):
        following = ops.convert_to_tensor([row[length + step] for row, length in zip(rows, lengths, strict=True)])
        for _ in range(repeat):
            index = ops.convert_to_tensor(ROOM + step, "int32")
            logits, _, cache = then(ops.cast(following, "int32"), cache, index)
        found.append(ops.convert_to_numpy(logits))
    return np.stack(found, axis=1)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


LENGTHS = (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3)


@pytest.mark.parametrize("length", LENGTHS)
def test_cached_and_uncached_logits_of_a_row_alone(length, cached, uncached):
    (row,) = tokens(1)
    close(cached([row], [length])[0], uncached(row, length))


def test_cached_and_uncached_logits_of_a_ragged_batch(cached, uncached):
    rows = tokens(len(LENGTHS))
    for found, row, length in zip(cached(rows, LENGTHS), rows, LENGTHS, strict=True):
        close(found, uncached(row, length))


def test_running_a_step_again_changes_nothing(cached):
    rows = tokens(len(LENGTHS))
    np.testing.assert_array_equal(cached(rows, LENGTHS, repeat=2), cached(rows, LENGTHS))


@settings(max_examples=8)
@given(st.tuples(*[st.integers(1, ROOM)] * 4), st.integers(0, 2**16))
def test_rows_of_any_lengths_are_as_they_are_alone(cached, uncached, lengths, seed):
    rows = tokens(4, seed)
    for found, row, length in zip(cached(rows, lengths), rows, lengths, strict=True):
        close(found, uncached(row, length))


def test_local_layers_keep_their_window_only(model):
    ones = np.ones((1, ROOM), "int32")
    _, _, cache = prefill(model.backbone, ops.convert_to_tensor(ones), ops.convert_to_tensor(ones), TOTAL)
    assert [keys.shape[1] for keys, _ in cache["layers"]] == [WINDOW, TOTAL]
    assert all(keys.shape == values.shape for keys, values in cache["layers"])


@pytest.mark.once
@given(st.integers(0, 60), st.integers(1, 17))
def test_tokens_in_ring_are_the_last_written(index, slots):
    ring = [None] * slots
    for token in range(index + 1):
        ring[token % slots] = token
    found = [token if token >= 0 else None for token in tokens_in_ring(index, np.arange(slots)).tolist()]
    assert found == ring


# Sampling loops


def generate(model, sampler, rows, steps, stop_token_ids=None):
    if model.sampler is not sampler:
        model.compile(sampler=sampler)
    length = max(map(len, rows)) + steps
    ids, mask = np.zeros((2, len(rows), length), "int32")
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    made = model.generate(
        {"token_ids": ids, "padding_mask": mask}, stop_token_ids=stop_token_ids, strip_prompt=True, max_new_tokens=steps
    )
    return [row[real].tolist() for row, real in zip(made["token_ids"], made["padding_mask"].astype(bool), strict=True)]


def log_probability(forward, prompt, continuations):
    """Of each continuation, given the prompt."""
    continuations = np.asarray(continuations)
    length = continuations.shape[1]
    logits = forward([prompt + row for row in continuations.tolist()]).astype("float64")
    logits = logits[:, len(prompt) - 1 :][:, :length]
    logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logits, continuations[:, :, None], -1).sum((1, 2))


PROMPTS = [tokens(1)[0, :3].tolist(), tokens(1)[0, :9].tolist()]


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, "greedy", PROMPTS, STEPS)


def test_greedy_takes_the_likeliest_token_each_time(forward, greedy):
    for prompt, made in zip(PROMPTS, greedy, strict=True):
        assert len(made) == STEPS
        assert forward([prompt + made])[0, len(prompt) - 1 :][:STEPS].argmax(-1).tolist() == made


def test_a_single_beam_is_greedy(model, greedy):
    assert generate(model, keras_hub.samplers.BeamSampler(num_beams=1), PROMPTS, STEPS) == greedy


def test_beams_find_what_is_at_least_as_likely_as_greedy(model, forward, greedy):
    beams = generate(model, keras_hub.samplers.BeamSampler(num_beams=4), PROMPTS, STEPS)
    for prompt, found, taken in zip(PROMPTS, beams, greedy, strict=True):
        (of_beams,), (of_greedy,) = (log_probability(forward, prompt, [row]) for row in (found, taken))
        assert of_beams >= of_greedy


def test_as_many_beams_as_tokens_find_the_likeliest_pair(model, forward):
    found = generate(model, keras_hub.samplers.BeamSampler(num_beams=VOCABULARY), PROMPTS, 2)
    pairs = [[a, b] for a in range(VOCABULARY) for b in range(VOCABULARY)]
    for prompt, pair in zip(PROMPTS, found, strict=True):
        assert pair == pairs[log_probability(forward, prompt, pairs).argmax()]


def test_contrastive_search_without_a_penalty_is_greedy(model, greedy):
    assert generate(model, keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.0), PROMPTS, STEPS) == greedy


def contrastive(forward, states, prompt, k, alpha):
    """Contrastive search written out: a probability less the greatest cosine to what stands before."""
    row = list(prompt)
    for _ in range(STEPS):
        logits = forward([row])[0, len(row) - 1].astype("float64")
        probabilities = np.exp(logits) / np.exp(logits).sum()
        candidates = np.argsort(-probabilities)[:k]
        directions = states([[*row, token] for token in candidates])[:, : len(row) + 1].astype("float64")
        directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
        cosines = np.einsum("ktd,kd->kt", directions[:, :-1], directions[:, -1]).max(-1)
        scores = (1 - alpha) * probabilities[candidates] - alpha * cosines
        assert np.ptp(np.sort(scores)[-2:]) > 1e-4
        row.append(int(candidates[scores.argmax()]))
    return row[len(prompt) :]


def test_contrastive_search_is_that_written_out(model, forward, states, greedy):
    found = generate(model, keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.6), PROMPTS, STEPS)
    assert found != greedy
    assert found == [contrastive(forward, states, prompt, 3, 0.6) for prompt in PROMPTS]


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "own_loop"), [("greedy", False), ("top_k", False), ("top_p", False), ("beam", True), ("contrastive", True)]
)
def test_samplers_that_search_are_known(name, own_loop):
    assert searches(keras_hub.samplers.get(name)) is own_loop
