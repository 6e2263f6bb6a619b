"""Chunks and steps over an explicit cache against the whole forward pass, and the searches that run on them."""

from __future__ import annotations

import keras_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from gemma2_keras.config import Gemma2Config
from gemma2_keras.generation import engine
from gemma2_keras.generation.native import NativeModel, is_supported
from gemma2_keras.generation.search import searches
from gemma2_keras.ops.masks import PADDING

WINDOW, VOCABULARY, STEPS, ROWS = 4, 13, 6, 4
# All calls share these shapes, so that each program is compiled once: prompts of at most 12 tokens, and what follows.
ROOM, TOTAL = 2 * WINDOW + 4, 2 * WINDOW + 4 + STEPS
LENGTHS = (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3)
array = ops.convert_to_numpy


@pytest.fixture(autouse=True)
def _small_rings(monkeypatch):
    """Rings that are overwritten within the few tokens of these tests."""
    monkeypatch.setattr(engine, "SPARE", 3)


def tokens(rows=ROWS, seed=0):
    return np.random.default_rng(seed).integers(1, VOCABULARY, (rows, TOTAL)).astype("int32")


@pytest.fixture(scope="module")
def run(programs, backbone):
    """The engine's functions as programs."""

    class Programs:
        chunk = staticmethod(programs.program(lambda *given: engine.chunk(backbone, *given)))
        chunk_behind = staticmethod(
            programs.program(lambda ids, positions, past: engine.chunk(backbone, ids, positions, past=past))
        )
        write = staticmethod(programs.program(engine.write_chunk))
        step = staticmethod(programs.program(lambda *given: engine.decode_step(backbone, *given)))
        logits = staticmethod(programs.program(lambda hidden: backbone.token_embedding(hidden, reverse=True)))

    return Programs


def prefilled(run, backbone, rows, lengths):
    """The logits after each prompt token, and a cache that has them, from one chunk padded on the right."""
    lengths = np.asarray(lengths, "int32")
    place = np.arange(ROOM, dtype="int32")[None]
    positions = np.where(place < lengths[:, None], place, PADDING).astype("int32")
    hidden, chunks = run.chunk(rows[:, :ROOM].copy(), positions)
    offsets = np.arange(len(rows), dtype="int32") * ROOM
    cache = run.write(engine.empty_cache(backbone, len(rows), TOTAL), chunks, offsets, lengths)
    return array(run.logits(hidden)), cache


def stepped(run, cache, rows, lengths, count=STEPS):
    """(B, count, V) logits after each further token, and the cache."""
    found = []
    for step in range(count):
        now = rows[np.arange(len(rows)), np.asarray(lengths) + step]
        logits, _, cache = run.step(now, cache)
        found.append(array(logits))
    return np.stack(found, axis=1), cache


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


def close_to_whole_rows(run, backbone, forward, rows, lengths):
    prompt, cache = prefilled(run, backbone, rows, lengths)
    then, cache = stepped(run, cache, rows, lengths)
    whole = forward(rows)
    for row, length in enumerate(lengths):
        close(prompt[row, :length], whole[row, :length])
        close(then[row], whole[row, length : length + STEPS])
    assert array(cache["lengths"]).tolist() == [length + STEPS for length in lengths]


@pytest.mark.parametrize("length", LENGTHS)
def test_cached_and_uncached_logits_of_rows_of_one_length(run, backbone, forward, length):
    close_to_whole_rows(run, backbone, forward, tokens(), [length] * ROWS)


def test_cached_and_uncached_logits_of_a_ragged_batch(run, backbone, forward):
    close_to_whole_rows(run, backbone, forward, tokens(), LENGTHS)


@settings(max_examples=8)
@given(lengths=st.tuples(*[st.integers(1, ROOM)] * ROWS), seed=st.integers(0, 2**16))
def test_rows_of_any_lengths_are_as_they_are_alone(run, backbone, forward, lengths, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "SPARE", 3)
        close_to_whole_rows(run, backbone, forward, tokens(seed=seed), lengths)


def test_a_chunk_behind_what_is_cached_leaves_it_as_it_is(run, backbone, forward):
    rows, before = tokens(), [1, 4, 6, 9]
    _, cache = prefilled(run, backbone, rows, before)
    kept = [array(x).copy() for pair in cache["layers"] for x in pair]
    counts = np.asarray([3, 5, 1, 5], "int32")
    ids, positions = np.zeros((ROWS, 5), "int32"), np.full((ROWS, 5), PADDING, "int32")
    for row, (start, count) in enumerate(zip(before, counts, strict=True)):
        ids[row, :count] = rows[row, start : start + count]
        positions[row, :count] = np.arange(start, start + count)
    hidden, chunks = run.chunk_behind(ids, positions, cache)
    logits, whole = array(run.logits(hidden)), forward(rows)
    for row, (start, count) in enumerate(zip(before, counts, strict=True)):
        close(logits[row, :count], whole[row, start : start + count])
    for found, old in zip([x for pair in cache["layers"] for x in pair], kept, strict=True):
        np.testing.assert_array_equal(array(found), old)
    # Written behind it, the rows go on from there.
    cache = run.write(cache, chunks, np.arange(ROWS, dtype="int32") * 5, counts)
    lengths = np.asarray(before) + counts
    then, _ = stepped(run, cache, rows, lengths, 3)
    for row, length in enumerate(lengths):
        close(then[row], whole[row, length : length + 3])


def test_segments_of_one_row_do_not_see_one_another(run, backbone, forward):
    rows, counts = tokens(), np.asarray([5, 2, 4, 1], "int32")
    parts = [row[:count] for row, count in zip(rows, counts, strict=True)]
    positions = np.concatenate([np.arange(count) for count in counts]).astype("int32")
    segments = np.repeat(np.arange(ROWS), counts).astype("int32")
    hidden, chunks = run.chunk(np.concatenate(parts)[None], positions[None], segments[None])
    offsets = (np.cumsum(counts) - counts).astype("int32")
    logits, whole = array(run.logits(hidden))[0], forward(parts)
    for row, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
        close(logits[offset : offset + count], whole[row, :count])
    cache = run.write(engine.empty_cache(backbone, ROWS, TOTAL), chunks, offsets, counts)
    then, _ = stepped(run, cache, rows, counts)
    whole = forward(rows)
    for row, count in enumerate(counts):
        close(then[row], whole[row, count : count + STEPS])


def test_a_step_that_was_rolled_back_leaves_no_trace(run, backbone):
    rows = tokens()
    _, cache = prefilled(run, backbone, rows, LENGTHS)
    other = (rows + 1) % VOCABULARY
    _, astray = stepped(run, engine.fork(cache, np.arange(ROWS)), other, LENGTHS, 3)
    again, _ = stepped(run, engine.roll_back(astray, np.asarray(LENGTHS)), rows, LENGTHS)
    expected, _ = stepped(run, cache, rows, LENGTHS)
    np.testing.assert_array_equal(again, expected)


def test_forked_rows_go_on_by_themselves(run, backbone, forward):
    rows = tokens()
    _, cache = prefilled(run, backbone, rows, LENGTHS)
    branch = engine.fork(cache, np.asarray([3, 0, 3, 0], "int32"))
    mixed = rows.copy()
    lengths = [LENGTHS[row] for row in (3, 0, 3, 0)]
    for row, (source, length) in enumerate(zip((3, 0, 3, 0), lengths, strict=True)):
        mixed[row, :length] = rows[source, :length]
    then, _ = stepped(run, branch, mixed, lengths, 3)
    whole = forward(mixed)
    for row, length in enumerate(lengths):
        close(then[row], whole[row, length : length + 3])
    close(stepped(run, cache, rows, LENGTHS, 1)[0][:, 0], forward(rows)[np.arange(ROWS), LENGTHS])


# Sizes

CONFIG = {"vocabulary_size": 9, "num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 24, "intermediate_dim": 4}


@pytest.mark.once
@given(
    window=st.integers(1, 9),
    spare=st.integers(0, 9),
    length=st.integers(0, 40),
    to=st.integers(-2, 40),
    room=st.integers(1, 40),
)
def test_a_row_can_return_to_where_its_ring_still_has_what_is_seen_from_there(window, spare, length, to, room):
    config = Gemma2Config(**CONFIG, num_layers=1, head_dim=8, sliding_window_size=window)
    slots = min(max(room, length), window + spare)
    ring = [None] * slots
    for token in range(length):
        ring[token % slots] = token
    seen = range(max(0, to - window + 1), max(to, 0))
    possible = 0 <= to <= length and all(ring[token % slots] == token for token in seen)
    found = engine.can_roll_back(config, slots, length, to)
    # Where nothing is seen, as from the beginning, it may be said to be lost.
    assert found == possible or (not seen and not found)


@pytest.mark.once
def test_local_layers_have_a_ring_and_the_others_room_for_all():
    config = Gemma2Config(**CONFIG, num_layers=3, head_dim=8, sliding_window_size=WINDOW)
    assert engine.slot_counts(config, 5) == [5, 5, 5]
    assert engine.slot_counts(config, 7) == [7, 7, 7]
    assert engine.slot_counts(config, 20) == [7, 20, 7]


@pytest.mark.parametrize("length", [3, 20])
def test_cache_bytes_are_those_of_a_cache(backbone, length):
    expected = engine.cache_bytes(backbone.config, 3, length, "float32")
    layers = engine.empty_cache(backbone, 3, length)["layers"]
    assert sum(array(x).nbytes for pair in layers for x in pair) == expected
    if is_supported(backbone):
        layers = NativeModel(backbone).empty_cache(3, length)["layers"]
        assert sum(x.nbytes for pair in layers for x in pair) == expected
    assert engine.cache_bytes(backbone.config, 3, length, "bfloat16") * 2 == expected
    assert engine.cache_bytes(backbone.config, 3, length, "float16") * 2 == expected


# Searches


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
