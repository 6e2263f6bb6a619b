"""Sessions that grow, return and branch, against the whole forward pass; and the same tokens on every path."""

from __future__ import annotations

import itertools

import keras
import keras_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from gemma2_keras.errors import InputError
from gemma2_keras.generation import engine
from gemma2_keras.generation.sampling import Sampling, sampling_of
from gemma2_keras.generation.session import Engine, Session
from gemma2_keras.kernels import native

WINDOW, VOCABULARY, ROOM, ROWS = 4, 13, 48, 4
LENGTHS = (WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3)
GREEDY = Sampling(temperature=0.0)
BACKEND = keras.backend.backend()


@pytest.fixture(autouse=True)
def _small_rings(monkeypatch):
    """Rings that are overwritten within the few tokens of these tests."""
    monkeypatch.setattr(engine, "SPARE", 3)


def tokens(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(1, VOCABULARY, length).tolist() for length in lengths]


def opened(programs, rows):
    session = Session(programs, len(rows), ROOM)
    session.extend(rows)
    return session


def made(session, limits=8, stop_ids=(), sampling=GREEDY, seeds=None, **options):
    """All the tokens that follow each row."""
    limits = [limits] * len(session.ids) if isinstance(limits, int) else limits
    rows = [[] for _ in limits]
    for some in session.generate(limits, stop_ids, sampling, seeds, **options):
        for row, tokens in zip(rows, some, strict=True):
            row += tokens
    return rows


class Follow:
    """A logits processor that forces given tokens, and keeps the logits before each."""

    def __init__(self, rows):
        self.rows = rows
        self.logits = []

    def __call__(self, ids, logits):
        step = len(self.logits)
        self.logits.append(logits.copy())
        forced = np.full_like(logits, -np.inf)
        for row, tokens in enumerate(self.rows):
            forced[row, tokens[min(step, len(tokens) - 1)]] = 0
        return forced


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


def close_to_whole_rows(session, forward):
    """What is expected next is what the whole forward pass over the session's tokens expects."""
    session.extend([[]] * len(session.ids))
    whole = forward(session.ids)
    close(session.logits(), np.stack([logits[len(row) - 1] for logits, row in zip(whole, session.ids, strict=True)]))


# Cached and uncached


@pytest.mark.parametrize("lengths", [*([length] for length in LENGTHS), LENGTHS], ids=str)
def test_cached_and_uncached_logits(path, programs, forward, lengths):
    prompts, following = tokens(*lengths), tokens(*[6] * len(lengths), seed=1)
    session = opened(programs, prompts)
    close_to_whole_rows(session, forward)
    follow = Follow(following)
    assert made(session, 6, sampling=Sampling(temperature=0.0, logits_processors=[follow])) == following
    whole = forward(session.ids)
    for row, length in enumerate(lengths):
        close(np.stack(follow.logits)[:, row], whole[row, length - 1 : length + 5])


def test_greedy_tokens_are_those_of_the_forward_pass(path, programs, forward):
    prompts = tokens(*LENGTHS)
    session = opened(programs, prompts)
    found = made(session, 12)
    whole = forward(session.ids)
    for prompt, row, logits in zip(prompts, found, whole, strict=True):
        assert logits[len(prompt) - 1 :][:12].argmax(-1).tolist() == row
    assert session.ids == [prompt + row for prompt, row in zip(prompts, found, strict=True)]


@pytest.mark.parametrize("burst", [1, 3, 20])
def test_the_size_of_a_burst_changes_nothing_with_the_kernels(programs, burst):
    prompts = tokens(*LENGTHS)
    for sampling in (GREEDY, Sampling(temperature=1.5)):
        expected = made(opened(programs, prompts), 11, sampling=sampling)
        assert made(opened(programs, prompts), 11, sampling=sampling, burst=burst) == expected


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("burst", [1, 3])
def test_the_size_of_a_burst_changes_nothing_without_them(programs, burst):
    prompts, sampling = tokens(*LENGTHS), Sampling(temperature=1.5)
    expected = made(opened(programs, prompts), 11, sampling=sampling)
    assert made(opened(programs, prompts), 11, sampling=sampling, burst=burst) == expected
    assert [len(row) for row in expected] == [11] * ROWS


def test_a_pause_decides_how_many_tokens_come_at_a_time_and_changes_none(path, backbone):
    programs = Engine(backbone)
    prompts = tokens(*LENGTHS)
    for sampling in (GREEDY, Sampling(temperature=1.5)):
        expected = made(opened(programs, prompts), 20, sampling=sampling)
        compiled = programs.compilations
        sizes = {}
        for pause in (1e-9, 0.03, 1e9):
            session = opened(programs, prompts)
            sizes[pause] = [len(some[0]) for some in session.generate([20] * ROWS, (), sampling, pause=pause)]
            assert session.ids == [prompt + row for prompt, row in zip(prompts, expected, strict=True)]
        # The first token comes by itself, and so does the second, which tells how long one takes.
        assert sizes[1e-9] == [1] * 20
        by_hand = path == "native" and sampling is not GREEDY
        assert sizes[1e9] == ([1] * 20 if by_hand else [1, 1, 8, 8, 2])
        # One program serves any number of steps.
        assert programs.compilations == compiled


# Prefill in chunks


@pytest.mark.parametrize("lengths", [(3, 2, 1, 4), (1, 11, 9, 2), (7, 7, 14, 1), (8, 20, 6, 13)], ids=str)
def test_prompts_in_chunks_are_as_prompts_at_once(path, programs, forward, monkeypatch, lengths):
    prompts = tokens(*lengths)
    at_once = opened(programs, prompts)
    monkeypatch.setattr(engine, "CHUNK", 7)
    session = opened(programs, prompts)
    assert session.prefilled == sum(lengths)
    close(session.logits(), at_once.logits())
    close_to_whole_rows(session, forward)
    made(session, 9)
    made(at_once, 9)
    assert session.ids == at_once.ids
    close_to_whole_rows(session, forward)


def test_more_prompts_than_one_chunk_takes(programs, forward, monkeypatch):
    monkeypatch.setattr("gemma2_keras.generation.session._SEGMENTS", 3)
    session = opened(programs, tokens(5, 1, 4, 2, 3, 6, 1))
    close_to_whole_rows(session, forward)


@settings(max_examples=8)
@given(data=st.data())
def test_rows_that_grow_in_any_steps_are_as_given_at_once(programs, forward, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "CHUNK", 7)
        patch.setattr(engine, "SPARE", 3)
        patch.setattr("gemma2_keras.generation.session.is_supported", lambda _: False)
        session = opened(programs, tokens(*data.draw(st.tuples(*[st.integers(1, 12)] * ROWS))))
        for seed in range(data.draw(st.integers(1, 3))):
            match data.draw(st.sampled_from(["extend", "generate", "roll back"])):
                case "extend":
                    session.extend(tokens(*data.draw(st.tuples(*[st.integers(0, 5)] * ROWS)), seed=seed + 1))
                case "generate":
                    made(session, data.draw(st.lists(st.integers(0, 6), min_size=ROWS, max_size=ROWS)))
                case "roll back":
                    session.roll_back([data.draw(st.integers(1, len(row))) for row in session.ids])
            close_to_whole_rows(session, forward)


# Going on, returning, branching


def test_tokens_appended_after_generating(path, programs, forward):
    session = opened(programs, tokens(*LENGTHS))
    made(session, [5, 0, 8, 1])
    session.extend(tokens(2, 5, 0, 1, seed=1))
    close_to_whole_rows(session, forward)
    made(session, 4)
    session.extend(tokens(0, 1, 0, 0, seed=2))
    close_to_whole_rows(session, forward)


def test_only_what_was_not_run_is_prefilled(path, programs):
    session = opened(programs, tokens(*LENGTHS))
    assert session.prefilled == sum(LENGTHS)
    made(session, 5)
    assert session.prefilled == sum(LENGTHS)
    session.extend(tokens(2, 0, 0, 0, seed=1))
    # The last token made of each row was not run yet.
    assert session.prefilled == sum(LENGTHS) + 2 + ROWS
    session.extend([[]] * ROWS)
    assert session.prefilled == sum(LENGTHS) + 2 + ROWS


# The rings have 7 slots, 3 beyond the window: 4 tokens of a longer row can be taken back.
@pytest.mark.parametrize(
    ("lengths", "kept", "run"),
    [
        ((6, 6, 6, 6), (5, 3, 1, 6), 3),
        ((20, 20, 20, 20), (19, 18, 17, 20), 3),
        ((20, 20, 20, 20), (16, 13, 1, 20), 16 + 13 + 1),
        ((20, 5, 8, 11), (17, 5, 5, 10), 3),
    ],
    ids=["nothing overwritten", "within the ring", "beyond the ring", "ragged"],
)
def test_rows_return_to_an_earlier_length(path, programs, forward, lengths, kept, run):
    prompts = tokens(*lengths)
    session = opened(programs, prompts)
    before = session.prefilled
    session.roll_back(kept)
    assert session.ids == [prompt[:length] for prompt, length in zip(prompts, kept, strict=True)]
    assert session.prefilled - before == run
    close_to_whole_rows(session, forward)
    other = opened(programs, session.ids)
    assert made(session) == made(other)


def test_tokens_that_were_made_are_taken_back(path, programs, forward):
    prompts = tokens(*LENGTHS)
    session = opened(programs, prompts)
    first = made(session, 10)
    session.roll_back([len(row) + 2 for row in prompts])
    close_to_whole_rows(session, forward)
    assert made(session) == [row[2:] for row in first]


def test_a_row_emptied_begins_anew(path, programs, forward):
    session = opened(programs, tokens(*LENGTHS))
    session.roll_back([0, 4, 0, 11])
    assert list(map(len, session.ids)) == [0, 4, 0, 11]
    session.extend(tokens(5, 0, 9, 0, seed=1))
    close_to_whole_rows(session, forward)


def test_rows_become_others_running_only_what_differs(path, programs, forward):
    prompts = tokens(9, 9, 9, 9)
    session = opened(programs, prompts)
    same, longer, shorter, other = prompts
    wanted = [same, [*longer, 3, 4, 5], shorter[:7], [*other[:7], 1 + other[7] % 12, 2]]
    before = session.prefilled
    session.become(wanted)
    assert session.ids == wanted
    # Of what stays in a row that loses tokens, the last may be run again.
    assert session.prefilled - before <= 3 + 2 + 3
    close_to_whole_rows(session, forward)
    assert made(session) == made(opened(programs, wanted))


def test_rows_become_what_has_nothing_in_common(path, programs, forward):
    session = opened(programs, tokens(20, 3, 5, 9))
    made(session, 4)
    wanted = tokens(2, 18, 6, 1, seed=1)
    session.become(wanted)
    assert session.ids == wanted
    close_to_whole_rows(session, forward)


def test_forks_go_on_by_themselves(path, programs, forward):
    prompts = tokens(*LENGTHS)
    session = opened(programs, prompts)
    branch = session.fork([3, 0, 3, 2])
    assert branch.prefilled == 0
    branch.extend(tokens(1, 2, 3, 4, seed=1))
    made(branch, 6)
    close_to_whole_rows(branch, forward)
    assert branch.ids[0][:11] == branch.ids[2][:11] == prompts[3]
    assert session.ids == prompts
    assert made(session) == made(opened(programs, prompts))


def test_forks_of_rows_in_the_middle_of_generating(path, programs, forward):
    session = opened(programs, tokens(*LENGTHS))
    going = session.generate([12] * ROWS)
    next(going), next(going)
    branch = session.fork(range(ROWS))
    close_to_whole_rows(branch, forward)
    rest = [list(itertools.chain(*rows)) for rows in zip(*going, strict=True)]
    assert made(branch, len(rest[0])) == rest


# Room


def test_more_than_there_is_room_for_is_refused_and_changes_nothing(path, programs, forward):
    prompts = tokens(ROOM - 2, 3, 5, 4)
    session = opened(programs, prompts)
    before = session.logits()
    with pytest.raises(InputError, match=r"Row 0 .* 49 .* 48"):
        session.extend([[1, 2, 3], [1], [], []])
    with pytest.raises(InputError, match="Row 2"):
        session.become([prompts[0][:3], prompts[1], [1] * (ROOM + 1), [2]])
    with pytest.raises(InputError, match="Row 0"):
        made(session, [3, 1, 1, 1])
    assert session.ids == prompts
    np.testing.assert_array_equal(session.logits(), before)
    made(session, [2, 1, 1, 1])
    assert len(session.ids[0]) == ROOM
    close_to_whole_rows(session, forward)


def test_a_session_longer_than_the_context_is_refused(programs):
    with pytest.raises(InputError, match=r"65.*64"):
        Session(programs, 1, 65)
    Session(programs, 1, 64)


# Ends


def test_limits_and_stop_tokens_end_rows(path, programs, forward):
    prompts = tokens(*LENGTHS)
    free = made(opened(programs, prompts), 12)
    stop_ids = (free[0][5], free[2][3])
    limits = [12, 3, 12, 0]

    def cut(row, limit):
        ends = [i for i, token in enumerate(row[:limit]) if token in stop_ids]
        return row[: ends[0] + 1] if ends else row[:limit]

    expected = [cut(row, limit) for row, limit in zip(free, limits, strict=True)]
    assert len({len(row) for row in expected}) > 2
    for sampling in (GREEDY, Sampling(temperature=0.0, logit_bias={0: 0.0})):
        session = opened(programs, prompts)
        assert made(session, limits, stop_ids, sampling) == expected
        assert session.ids == [prompt + row for prompt, row in zip(prompts, expected, strict=True)]
        close_to_whole_rows(session, forward)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.3)], ids=["greedy", "random"])
def test_rows_that_are_finished_get_no_more(path, programs, forward, sampling):
    prompts = tokens(*LENGTHS)
    expected = made(opened(programs, prompts), 20, sampling=sampling)
    session, rows = opened(programs, prompts), [[] for _ in prompts]
    for count, some in enumerate(session.generate([20] * ROWS, (), sampling, burst=4)):
        for row, new in zip(rows, some, strict=True):
            row += new
        if count == 1:
            session.finish([1, 3])
            ended = [len(row) for row in rows]
    assert [len(rows[row]) for row in (1, 3)] == [ended[1], ended[3]]
    assert [len(rows[row]) for row in (0, 2)] == [20, 20]
    assert rows == [row[: len(some)] for row, some in zip(expected, rows, strict=True)]
    close_to_whole_rows(session, forward)


def test_generating_ends_once_all_rows_are_finished(path, programs):
    session = opened(programs, tokens(*LENGTHS))
    calls = 0
    for _ in session.generate([20] * ROWS, burst=2):
        calls += 1
        session.finish(range(ROWS))
    assert calls == 1
    # What was finished then is not finished now.
    assert [len(row) for row in made(session, 3)] == [3] * ROWS


def test_a_caller_who_leaves_finds_the_session_whole(path, programs, forward):
    prompts = tokens(*LENGTHS)
    session = opened(programs, prompts)
    seen = [
        list(itertools.chain(*rows)) for rows in zip(*itertools.islice(session.generate([20] * ROWS), 2), strict=True)
    ]
    assert session.ids == [prompt + row for prompt, row in zip(prompts, seen, strict=True)]
    close_to_whole_rows(session, forward)


# Programs


@pytest.mark.skipif(BACKEND == "torch", reason="nothing is compiled there")
def test_other_prompts_limits_and_numbers_compile_nothing_anew(path, backbone):
    programs = Engine(backbone)

    def run(lengths, limits, seed, temperature, p, stop_ids):
        session = Session(programs, 2, 2 + max(map(sum, zip(lengths, limits, strict=True))))
        session.extend(tokens(*lengths, seed=seed))
        sampling = Sampling(temperature=temperature, top_p=p, repetition_penalty=p + 1, logit_bias={seed: p})
        made(session, limits, stop_ids, sampling, [(seed, 0), (seed, 0)])
        session.extend(tokens(1, 2, seed=seed))
        made(session, 0)

    run([5, 9], [3, 7], 0, 0.8, 0.9, (1,))
    compilations = programs.compilations
    assert compilations > 0
    run([30, 2], [4, 20], 1, 1.7, 0.3, ())
    run([12, 12], [1, 1], 2, 0.1, 0.99, (5, 6, 7))
    assert programs.compilations == compilations


def test_changed_weights_are_seen_by_the_next_session(path, backbone, programs, forward):
    prompts = tokens(*LENGTHS)
    before = made(opened(programs, prompts), 9)
    kept = [ops.convert_to_numpy(weight).copy() for weight in backbone.weights]
    try:
        random = np.random.default_rng(7)
        for weight in backbone.weights:
            weight.assign(random.normal(0, 0.4, weight.shape).astype("float32"))
        session = opened(programs, prompts)
        assert made(session, 9) != before
        close_to_whole_rows(session, forward)
    finally:
        for weight, value in zip(backbone.weights, kept, strict=True):
            weight.assign(value)
    assert made(opened(programs, prompts), 9) == before


@pytest.mark.once
def test_without_a_compiler_the_tokens_are_the_same(programs, monkeypatch, tmp_path):
    prompts = tokens(*LENGTHS)
    samplings = [GREEDY, Sampling(temperature=1.3, top_p=0.9)]
    expected = [made(opened(programs, prompts), 9, sampling=sampling) for sampling in samplings]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    native.library.cache_clear()
    try:
        assert [made(opened(programs, prompts), 9, sampling=sampling) for sampling in samplings] == expected
        assert native.library() is None
    finally:
        native.library.cache_clear()


# Choosing, in sessions

SAMPLINGS = {
    "greedy": GREEDY,
    "random": Sampling(temperature=1.4),
    "filters": Sampling(temperature=2.0, top_k=9, top_p=0.95, min_p=0.01, typical_p=0.95),
    "penalties and bias": Sampling(
        temperature=0.9,
        repetition_penalty=1.4,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        logit_bias={3: 2.0},
        forbidden_tokens=[4, 5],
    ),
    "processor": Sampling(temperature=1.5, logits_processors=[lambda ids, logits: logits * 0.5]),
}


@pytest.fixture(scope="module")
def on_the_other_path(programs):
    """The tokens of each sampling without the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "SPARE", 3)
        patch.setattr("gemma2_keras.generation.session.is_supported", lambda _: False)
        seeds = [(5, 0)] * ROWS
        return {
            name: made(opened(programs, tokens(*LENGTHS)), 12, (), sampling, seeds)
            for name, sampling in SAMPLINGS.items()
        }


@pytest.mark.parametrize("name", SAMPLINGS)
def test_tokens_are_the_same_on_both_paths_alone_and_in_a_batch(path, programs, on_the_other_path, name):
    sampling, expected = SAMPLINGS[name], on_the_other_path[name]
    prompts = tokens(*LENGTHS)
    assert made(opened(programs, prompts), 12, (), sampling, [(5, 0)] * ROWS) == expected
    assert made(opened(programs, prompts[::-1]), 12, (), sampling, [(5, 0)] * ROWS) == expected[::-1]
    # Each way of choosing is compiled for one row, where there are no kernels: one way will do.
    if path == "native" or name == "filters":
        for row in (0, 3):
            assert made(opened(programs, [prompts[row]]), 12, (), sampling, [(5, 0)]) == [expected[row]]
    others = [tokens for other, tokens in on_the_other_path.items() if other != name]
    assert expected not in others


def test_copies_of_a_prompt_differ_and_are_the_same_each_time(path, programs):
    (prompt,) = tokens(5)
    sampling, seeds = SAMPLINGS["random"], [(7, 0), (7, 1), (7, 2), (8, 0)]
    first = made(opened(programs, [prompt] * ROWS), 12, (), sampling, seeds)
    assert made(opened(programs, [prompt] * ROWS), 12, (), sampling, seeds) == first
    assert len({tuple(row) for row in first}) > 1
    assert made(opened(programs, [prompt] * ROWS), 12, (), sampling, [(7, 0)] * ROWS) == [first[0]] * ROWS


def test_the_model_gives_copies_of_a_prompt_texts_of_their_own(model):
    (prompt,) = tokens(5)
    ids, mask = np.zeros((2, 3, 17), "int32")
    ids[:, :5], mask[:, :5] = prompt, 1

    def texts(seed):
        inputs = {"token_ids": ids, "padding_mask": mask}
        return model.generate(inputs, stop_token_ids=None, seed=seed, temperature=1.5)["token_ids"].tolist()

    assert texts(3) == texts(3)
    assert len(set(map(tuple, texts(3)))) > 1
    assert texts(3) != texts(4)


def test_forbidden_tokens_never_come_and_a_bias_forces(path, programs):
    prompts = tokens(*LENGTHS)
    for temperature in (0.0, 3.0):
        found = made(opened(programs, prompts), 12, sampling=Sampling(temperature, forbidden_tokens=range(0, 12, 2)))
        assert {token % 2 for row in found for token in row if token < 12} == {1}
        forced = made(opened(programs, prompts), 5, sampling=Sampling(temperature, logit_bias={6: 1000.0}))
        assert forced == [[6] * 5] * ROWS


def test_penalties_count_what_was_made_and_the_prompt(path, programs):
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8], [1, 2, 3, 4, 5]]
    # What was made once is as good as forbidden; 13 tokens are all there are.
    found = made(opened(programs, prompts), 13, sampling=Sampling(temperature=0.0, presence_penalty=1e4))
    assert [sorted(row) for row in found] == [list(range(VOCABULARY))] * ROWS
    # Those of the prompt are then no better than those that were made, where all logits are above zero.
    sampling = Sampling(
        temperature=0.0, repetition_penalty=1e4, logit_bias={}, logits_processors=[lambda _, x: x + 100]
    )
    found = made(opened(programs, prompts), 8, sampling=sampling)
    for prompt, row in zip(prompts, found, strict=True):
        assert len({*prompt, *row}) == len(prompt) + 8


def test_processors_get_the_tokens_so_far_and_may_force_one(path, programs):
    prompts, seen = tokens(*LENGTHS), []

    def force(ids, logits):
        seen.append([list(row) for row in ids])
        logits[:] = -np.inf
        logits[np.arange(len(ids)), [len(row) % VOCABULARY for row in ids]] = 0
        return logits

    def expected(prompt, count):
        return [(len(prompt) + i) % VOCABULARY for i in range(count)]

    for temperature in (0.0, 1.0):
        seen.clear()
        sampling = Sampling(temperature, logits_processors=[lambda ids, logits: logits + 1, force])
        session = opened(programs, prompts)
        assert made(session, 5, sampling=sampling) == [expected(prompt, 5) for prompt in prompts]
        assert seen == [[[*prompt, *expected(prompt, step)] for prompt in prompts] for step in range(5)]


def test_a_processor_may_keep_the_ids_and_spoil_what_it_is_given(path, programs):
    prompts = tokens(*LENGTHS)
    expected = made(opened(programs, prompts), 5)

    def spoil(ids, logits):
        result = logits.copy()
        logits[:] = np.nan
        for row in ids:
            row.clear()
        return result

    session = opened(programs, prompts)
    assert made(session, 5, sampling=Sampling(temperature=0.0, logits_processors=[spoil])) == expected
    assert session.ids == [prompt + row for prompt, row in zip(prompts, expected, strict=True)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_infinite_logit_forces_its_token(path, programs, temperature):
    def force(ids, logits):
        logits[:, 6] = np.inf
        return logits

    found = made(opened(programs, tokens(*LENGTHS)), 3, sampling=Sampling(temperature, logits_processors=[force]))
    assert found == [[6] * 3] * ROWS


@pytest.mark.parametrize(
    "result", [lambda logits: logits[:1], lambda logits: logits * np.nan, lambda logits: logits.T, lambda logits: 0.0]
)
def test_what_a_processor_must_not_return_is_refused_by_its_name(programs, result):
    def wayward(ids, logits):
        return result(logits)

    session = opened(programs, tokens(3, 5))
    with pytest.raises(InputError, match="wayward"):
        made(session, 2, sampling=Sampling(temperature=0.0, logits_processors=[wayward]))
    assert made(session, 2) == made(opened(programs, tokens(3, 5)), 2)


class Second(keras_hub.samplers.Sampler):
    """Takes the second likeliest token, and keeps the probabilities it was given."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.given = []

    def get_next_token(self, probabilities):
        self.given.append(ops.convert_to_numpy(probabilities))
        return ops.argsort(probabilities, axis=-1)[:, -2]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("forbidden", [[], [7]], ids=["all", "but one"])
def test_a_sampler_of_ones_own_chooses_among_what_is_left(path, programs, forward, temperature, forbidden):
    prompts, sampler = tokens(*LENGTHS), Second(temperature=temperature)
    session = opened(programs, prompts)
    found = made(session, 4, sampling=sampling_of(sampler, {"forbidden_tokens": forbidden}))
    whole = forward(session.ids).astype("float64")
    whole[:, :, forbidden] = -np.inf
    for row, (prompt, new) in enumerate(zip(prompts, found, strict=True)):
        logits = whole[row, len(prompt) - 1 :][:4]
        assert np.argsort(logits)[:, -2].tolist() == new
        weights = np.exp(logits / temperature)
        given = np.stack(sampler.given)[:, row]
        np.testing.assert_allclose(given, weights / weights.sum(-1, keepdims=True), atol=1e-5)
