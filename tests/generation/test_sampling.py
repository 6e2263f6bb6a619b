"""Filters and penalties against transformers' own, what is drawn against the probabilities, and what is refused."""

from __future__ import annotations

import keras_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops
from transformers.generation import logits_process

from gemma2_keras.errors import InputError
from gemma2_keras.generation.sampling import (
    EXCLUDED,
    Sampling,
    _drawn,
    adjusted,
    choose,
    kept,
    noise,
    sampling_of,
)
from gemma2_keras.kernels import compiled

VOCABULARIES = (7, 131, 1000)
SEEDS = st.integers(0, 2**20)
sizes = st.sampled_from(VOCABULARIES)
array = ops.convert_to_numpy
# Compiled on JAX and TensorFlow, once for each vocabulary: numbers are not compiled in.
_kept, _adjusted, _choose, _draw = (
    compiled(function, [], lambda: None, None)
    for function in (
        lambda logits, values, *, uses: kept(logits, values, uses),
        lambda logits, values, prompt, made, *, uses: adjusted(logits, values, prompt, made, uses),
        lambda logits, values, chance, *, uses, size: choose(ops.reshape(logits, (-1, size)), values, chance, uses),
        lambda logits, chance: _drawn(ops.reshape(logits, (-1, 131)), chance),
    )
)


def logits_of(seed, size, rows=3):
    return np.random.default_rng(seed).normal(0, 3, (rows, size)).astype("float32")


def kept_by(sampling, logits):
    size = logits.shape[1]
    found = array(_kept(logits, sampling.values(size), uses=sampling.uses))
    is_kept = found > EXCLUDED
    expected = (logits - logits.max(-1, keepdims=True)) / sampling.temperature
    np.testing.assert_allclose(found[is_kept], expected[is_kept], rtol=1e-5, atol=1e-6)
    return is_kept


def kept_by_transformers(warpers, logits, temperature=1.0):
    scores = torch.from_numpy(logits) / temperature
    for warper in warpers:
        scores = warper(None, scores)
    return torch.isfinite(scores).numpy()


# Filters


@given(SEEDS, sizes, st.integers(1, 1200))
def test_top_k_keeps_what_transformers_keeps(seed, size, k):
    logits = logits_of(seed, size)
    expected = kept_by_transformers([logits_process.TopKLogitsWarper(k)], logits)
    np.testing.assert_array_equal(kept_by(Sampling(top_k=k), logits), expected)
    assert expected.sum(-1).tolist() == [min(k, size)] * 3


def test_top_k_keeps_all_that_are_as_likely_as_the_last():
    logits = np.array([[1, 3, 2, 2, 0, 2, -1]] * 3, "float32")
    for k, count in ((1, 1), (2, 4), (3, 4), (4, 4), (5, 5)):
        assert kept_by(Sampling(top_k=k), logits).sum(-1).tolist() == [count] * 3


@given(SEEDS, sizes, st.floats(0.01, 0.99))
def test_top_p_keeps_what_transformers_keeps(seed, size, p):
    logits = logits_of(seed, size)
    expected = kept_by_transformers([logits_process.TopPLogitsWarper(p)], logits)
    np.testing.assert_array_equal(kept_by(Sampling(top_p=p), logits), expected)


@given(SEEDS, sizes, st.floats(0.001, 1))
def test_min_p_keeps_what_transformers_keeps(seed, size, p):
    logits = logits_of(seed, size)
    expected = kept_by_transformers([logits_process.MinPLogitsWarper(p)], logits)
    np.testing.assert_array_equal(kept_by(Sampling(min_p=p), logits), expected)


@given(SEEDS, sizes, st.floats(0.01, 0.99))
def test_typical_p_keeps_what_transformers_keeps(seed, size, p):
    logits = logits_of(seed, size)
    expected = kept_by_transformers([logits_process.TypicalLogitsWarper(p)], logits)
    np.testing.assert_array_equal(kept_by(Sampling(typical_p=p), logits), expected)


@given(SEEDS, st.floats(0.2, 3), st.integers(3, 120), st.floats(0.3, 0.99), st.floats(0.001, 0.2), st.floats(0.3, 0.99))
def test_filters_act_one_upon_what_the_other_kept_after_the_temperature(seed, temperature, k, p, least, typical):
    logits = logits_of(seed, 131)
    warpers = [
        logits_process.TopKLogitsWarper(k),
        logits_process.TopPLogitsWarper(p),
        logits_process.MinPLogitsWarper(least),
        logits_process.TypicalLogitsWarper(typical),
    ]
    sampling = Sampling(temperature=temperature, top_k=k, top_p=p, min_p=least, typical_p=typical)
    found, expected = kept_by(sampling, logits), kept_by_transformers(warpers, logits, temperature)
    assert found.any(-1).all()
    np.testing.assert_array_equal(found, expected)


def test_filters_without_effect_are_not_used():
    assert Sampling(top_p=1.0, typical_p=1.0).uses == ("noise",)
    assert Sampling(temperature=0.0, top_k=3, top_p=0.5).uses == ()
    assert kept_by(Sampling(min_p=1.0), logits_of(0, 131)).sum(-1).tolist() == [1, 1, 1]


def test_what_was_excluded_before_is_kept_by_no_filter():
    logits = logits_of(0, 131)
    logits[:, ::2] = EXCLUDED
    for sampling in (
        Sampling(temperature=50.0),
        Sampling(temperature=0.01),
        Sampling(top_k=131),
        Sampling(top_k=100),
        Sampling(top_p=0.999999),
        Sampling(min_p=1e-30),
        Sampling(typical_p=0.999999),
    ):
        found = array(_kept(logits, sampling.values(131), uses=sampling.uses))
        assert (found[:, ::2] == EXCLUDED).all()
        assert (found[:, 1::2] > EXCLUDED).any(-1).all()


# Penalties and bias


def history(seed, size, rows=3, length=9):
    """Token ids, with repetitions, of prompts and of what was made, and how often each stands there."""
    random = np.random.default_rng(seed)
    prompt, made = random.integers(0, min(size, 12), (2, rows, length))
    counts = [np.stack([np.bincount(row, minlength=size) for row in ids]).astype("int32") for ids in (prompt, made)]
    return prompt, made, counts


@given(SEEDS, sizes, st.floats(0.3, 3).filter(lambda x: x != 1))
def test_repetition_penalty_is_that_of_transformers(seed, size, penalty):
    logits = logits_of(seed, size)
    prompt, made, counts = history(seed, size)
    sampling = Sampling(repetition_penalty=penalty)
    found = array(_adjusted(logits, sampling.values(size), *counts, uses=sampling.uses))
    ids = torch.from_numpy(np.concatenate([prompt, made], axis=1))
    expected = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.from_numpy(logits))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)


@given(SEEDS, sizes, st.floats(-3, 3), st.floats(-3, 3))
def test_presence_and_frequency_count_what_was_made_alone(seed, size, presence, frequency):
    logits = logits_of(seed, size)
    _, made, counts = history(seed, size)
    sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency)
    found = array(_adjusted(logits, sampling.values(size), *counts, uses=sampling.uses))
    expected = logits.astype("float64")
    for row, tokens in enumerate(made.tolist()):
        for token in set(tokens):
            expected[row, token] -= presence + frequency * tokens.count(token)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_bias_is_added_after_the_penalties():
    logits = np.array([[4.0, -4.0, 1.0]], "float32")
    sampling = Sampling(repetition_penalty=2.0, presence_penalty=0.5, logit_bias={0: 1.0, 1: -1.0})
    counts = np.array([[1, 0, 0]], "int32"), np.array([[0, 1, 0]], "int32")
    found = array(_adjusted(logits, sampling.values(3), *counts, uses=sampling.uses))
    assert found.tolist() == [[4 / 2 + 1, -4 * 2 - 0.5 - 1, 1.0]]


def test_forbidden_tokens_are_excluded_whatever_their_bias():
    sampling = Sampling(forbidden_tokens=[2, 5], logit_bias={2: 1e9, 3: -2.5})
    found = array(_adjusted(logits_of(0, 7), sampling.values(7), *history(0, 7)[2], uses=sampling.uses))
    assert (found[:, [2, 5]] == EXCLUDED).all()
    np.testing.assert_allclose(found[:, 3], logits_of(0, 7)[:, 3] - 2.5, rtol=1e-6)
    np.testing.assert_array_equal(found[:, [0, 1, 4, 6]], logits_of(0, 7)[:, [0, 1, 4, 6]])


# Drawing

GRID = 4096


def frequencies(logits):
    """How often each token is drawn over an even grid of noise."""
    chance = (np.arange(GRID) / GRID).astype("float32")
    drawn = array(_draw(np.repeat(logits[None], GRID, axis=0), chance))
    # A greater noise never draws an earlier token.
    assert (np.diff(drawn) >= 0).all()
    return np.bincount(drawn, minlength=len(logits))


@settings(max_examples=30)
@given(SEEDS, st.floats(0.1, 5), st.integers(0, 130))
def test_tokens_are_drawn_as_often_as_they_are_likely(seed, spread, excluded):
    logits = np.random.default_rng(seed).normal(0, spread, 131).astype("float32")
    logits[np.random.default_rng(seed + 1).permutation(131)[:excluded]] = EXCLUDED
    weights = np.exp(logits.astype("float64") - logits.max())
    found = frequencies(logits)
    np.testing.assert_allclose(found, GRID * weights / weights.sum(), atol=1.1)
    assert not found[logits == EXCLUDED].any()


@pytest.mark.parametrize("at", [0, 1, 11, 12, 64, 130])
def test_a_single_token_left_is_drawn_by_any_noise(at):
    logits = np.full(131, EXCLUDED, "float32")
    logits[at] = -25.0
    assert frequencies(logits)[at] == GRID


@given(SEEDS, st.integers(1, 130))
def test_the_least_and_the_greatest_noise_draw_the_first_and_the_last_token_left(seed, excluded):
    logits = np.random.default_rng(seed).normal(0, 2, 131).astype("float32")
    logits[np.random.default_rng(seed + 1).permutation(131)[:excluded]] = EXCLUDED
    left = np.flatnonzero(logits > EXCLUDED)
    chance = np.tile(np.array([0, 1 - 2**-23], "float32"), GRID // 2)
    drawn = array(_draw(np.repeat(logits[None], GRID, axis=0), chance))[:2]
    assert drawn[0] == left[0]
    # The last ones may together be less likely than the distance from the greatest noise to 1.
    assert drawn[1] in left
    weights = np.exp(logits.astype("float64"))
    assert weights[drawn[1] + 1 :].sum() / weights.sum() < 1e-5


@given(SEEDS, sizes, st.sampled_from([0.0, 2**-23, 0.5, 1 - 2**-23]))
def test_no_filtered_token_is_chosen(seed, size, chance):
    logits = logits_of(seed, size)
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.4), Sampling(min_p=0.3), Sampling(typical_p=0.3)):
        tokens = array(
            _choose(logits, sampling.values(size), np.full(3, chance, "float32"), uses=sampling.uses, size=size)
        )
        assert tokens.dtype == "int32"
        assert kept_by(sampling, logits)[np.arange(3), tokens].all()


def test_greedy_takes_the_lowest_of_the_likeliest():
    logits = np.array([[0, 5, 5, 1, 5], [7, 7, 7, 7, 7]], "float32")
    sampling = Sampling(temperature=0.0)
    chosen = _choose(logits, sampling.values(5), np.full(2, 0.9, "float32"), uses=sampling.uses, size=5)
    assert array(chosen).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-30, 1e-37, 1e-45])
def test_a_vanishing_temperature_takes_the_likeliest(temperature):
    sampling = Sampling(temperature=temperature)
    for logits in (logits_of(0, 131), logits_of(0, 131) - 50):
        logits[:, 7] = EXCLUDED
        chosen = _choose(logits, sampling.values(131), np.full(3, 0.9, "float32"), uses=sampling.uses, size=131)
        assert array(chosen).tolist() == logits.argmax(-1).tolist()


# Noise


@pytest.mark.once
@given(SEEDS, st.integers(0, 5), st.lists(st.integers(0, 9), max_size=5), st.integers(1, 20), st.integers(1, 20))
def test_noise_depends_on_seed_copy_and_row_alone(seed, copy, row, few, more):
    found = noise(seed, copy, row, few + more)
    assert found.dtype == "float32"
    assert (found >= 0).all()
    assert (found <= 1 - 2.0**-23).all()
    np.testing.assert_array_equal(noise(seed, copy, np.asarray(row, "int32"), few + more), found)
    # How many are asked for at a time is no part of it.
    np.testing.assert_array_equal(noise(seed, copy, row, few), found[:few])


@pytest.mark.once
def test_noise_differs_with_all_that_it_depends_on():
    given = [
        (0, 0, [1, 2]),
        (1, 0, [1, 2]),
        (0, 1, [1, 2]),
        (0, 0, [2, 1]),
        (0, 0, [1]),
        (0, 0, [0, 1, 2]),
        (2**40, 0, [1, 2]),
    ]
    assert len({noise(*arguments, 8).tobytes() for arguments in given}) == len(given)


@pytest.mark.once
def test_noise_is_even():
    found = np.concatenate([noise(0, 0, [i], 50) for i in range(400)])
    counts = np.histogram(found, 20, (0, 1))[0]
    # Five standard deviations.
    assert np.abs(counts - 1000).max() < 5 * (20_000 * 0.05 * 0.95) ** 0.5


@pytest.mark.once
def test_noise_of_a_seed_stays_the_same_between_versions():
    assert noise(3, 1, [2, 7], 3).tolist() == [0.047219038009643555, 0.2282700538635254, 0.39613282680511475]


# What may be asked for


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, float("nan"), float("inf"), "1", None, True, [1.0]]),
        ("top_k", [0, -1, 1.0, 2.5, True, "3"]),
        ("top_p", [0, -0.1, 1.1, float("nan"), "0.5", True]),
        ("min_p", [0, -0.1, 1.1, float("nan"), "0.5"]),
        ("typical_p", [0, -0.1, 1.1, float("nan"), "0.5"]),
        ("repetition_penalty", [0, -1.0, float("nan"), float("inf"), None, "1"]),
        ("presence_penalty", [float("nan"), float("inf"), None, "1", True]),
        ("frequency_penalty", [float("nan"), -float("inf"), None, "1", True]),
        ("logit_bias", [[1, 2], None, "text", {1: float("nan")}, {1: "a"}, {1: float("inf")}]),
        ("forbidden_tokens", ["12", [1.5], [True], ["a"]]),
        ("logits_processors", [lambda ids, logits: logits, [1], ["a"]]),
    ],
)
def test_what_cannot_be_is_refused_by_name(name, values):
    for value in values:
        with pytest.raises(InputError, match=f"`{name}"):
            Sampling(**{name: value})


@pytest.mark.once
@pytest.mark.parametrize("name", ["logit_bias", "forbidden_tokens"])
@pytest.mark.parametrize("token", [-1, 7, 1.0, True, "a"])
def test_tokens_outside_the_vocabulary_are_refused_by_name(name, token):
    with pytest.raises(InputError, match=f"`{name}`"):
        Sampling(**{name: {token: 1.0} if name == "logit_bias" else [token]}).values(7)


@pytest.mark.once
def test_a_vocabulary_that_is_wholly_forbidden_is_refused():
    with pytest.raises(InputError, match="every token"):
        Sampling(forbidden_tokens=range(7)).values(7)
    Sampling(forbidden_tokens=range(6)).values(7)


@pytest.mark.once
def test_what_has_no_effect_is_not_used():
    assert Sampling().uses == ("noise",)
    assert Sampling(temperature=0.0, logit_bias={}, forbidden_tokens=()).uses == ()
    assert Sampling(temperature=0.0, repetition_penalty=1.2, frequency_penalty=-1).uses == (
        "repetition_penalty",
        "frequency_penalty",
    )
    assert not Sampling(forbidden_tokens=[1], top_k=3).remembers
    assert Sampling(presence_penalty=0.1).remembers
    assert Sampling(temperature=0.0).is_greedy
    assert not Sampling(temperature=1e-9).is_greedy
    assert not Sampling(temperature=0.0, sampler=object()).is_greedy


@pytest.mark.once
@pytest.mark.parametrize(
    ("sampler", "overrides", "expected"),
    [
        ("greedy", {}, {"temperature": 0.0}),
        ("greedy", {"repetition_penalty": 1.3}, {"temperature": 0.0, "repetition_penalty": 1.3}),
        ("greedy", {"temperature": 0.7}, {"temperature": 0.7}),
        ("greedy", {"top_p": 0.7}, {"temperature": 1.0, "top_p": 0.7}),
        ("greedy", {"temperature": 0.0, "top_k": 2}, {"temperature": 0.0, "top_k": 2}),
        ("greedy", {"top_k": None}, {"temperature": 0.0}),
        (keras_hub.samplers.RandomSampler(temperature=0.6), {}, {"temperature": 0.6}),
        (keras_hub.samplers.TopKSampler(k=4, temperature=0.6), {}, {"temperature": 0.6, "top_k": 4}),
        (keras_hub.samplers.TopKSampler(k=4), {"top_k": 2, "min_p": 0.1}, {"top_k": 2, "min_p": 0.1}),
        (keras_hub.samplers.TopPSampler(p=0.3, k=5), {}, {"top_p": 0.3, "top_k": 5}),
        (keras_hub.samplers.TopPSampler(p=0.3), {"temperature": 0.0}, {"top_p": 0.3, "temperature": 0.0}),
    ],
)
def test_samplers_of_keras_hub_are_known(sampler, overrides, expected):
    assert sampling_of(keras_hub.samplers.get(sampler), overrides) == Sampling(**expected)


@pytest.mark.once
def test_samplers_that_are_not_known_choose_by_themselves():
    class Changed(keras_hub.samplers.GreedySampler):
        pass

    for sampler in (Changed(), keras_hub.samplers.ContrastiveSampler(k=2, alpha=0.5)):
        assert sampling_of(sampler, {}).sampler is sampler
