"""The CPU kernels' decoding against the portable step and the whole forward pass."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
from keras import ops

from gemma2_keras import Gemma2Backbone
from gemma2_keras.generation.engine import decode_step, empty_cache
from gemma2_keras.generation.native import NativeModel, is_supported
from gemma2_keras.generation.session import Engine
from gemma2_keras.kernels import native, stored

# No size is a multiple of the vectors' 16, and the window is far below the length.
VOCABULARY, WIDTH, WINDOW, LENGTH, ROWS = 37, 36, 4, 13, 9
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
array = ops.convert_to_numpy


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    if native.library() is None:
        pytest.skip("no C++ compiler here")


@pytest.fixture(scope="module", autouse=True)
def _small_rings():
    """Rings that are overwritten within the few tokens of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gemma2_keras.generation.engine.SPARE", 3)
        yield


@functools.cache
def network(dtype="float32", lora=False, round_weights=False, dora=False, **options):
    backbone = Gemma2Backbone(
        **{
            "vocabulary_size": VOCABULARY,
            "num_layers": 3,
            "num_query_heads": 6,
            "num_key_value_heads": 2,
            "hidden_dim": WIDTH,
            "intermediate_dim": 50,
            "head_dim": 10,
            "query_pre_attention_scalar": 7,
            "attention_logit_soft_cap": 10.0,
            "sliding_window_size": WINDOW,
            "layer_norm_epsilon": 1e-3,
            "context_length": 64,
            "dtype": dtype,
            **options,
        }
    )
    if lora:
        backbone.enable_lora(3, PROJECTIONS, alpha=5.0, use_dora=dora)
    random = np.random.default_rng(0)
    # Adapters are drawn last, so that the others have the same weights without them.
    for weight in sorted(backbone.weights, key=lambda w: "lora" in w.name):
        values = random.normal(0, 0.35, weight.shape).astype("float32")
        if round_weights and "lora" not in weight.name:
            values = array(ops.cast(ops.cast(values, "bfloat16"), "float32"))
        weight.assign(values)
    return backbone


def tokens():
    return np.random.default_rng(1).integers(0, VOCABULARY, (ROWS, LENGTH)).astype("int32")


def forward(backbone):
    """(ROWS, LENGTH, V) logits of the whole rows at once."""

    def whole(token_ids, padding_mask):
        states = backbone({"token_ids": token_ids, "padding_mask": padding_mask})
        return backbone.token_embedding(states, reverse=True)

    return array(Engine(backbone).program(whole)(tokens(), np.ones((ROWS, LENGTH), "int32")))


def steps(model, rows, delays=None):
    """The same for some rows, token by token; row b waits for `delays[b]` steps while the others go on."""
    ids = tokens()[rows]
    delays = np.zeros(len(rows), int) if delays is None else np.asarray(delays)
    cache = model.empty_cache(len(rows), LENGTH)
    found = np.zeros((len(rows), LENGTH, VOCABULARY), "float32")
    for step in range(LENGTH + delays.max()):
        place = step - delays
        waits = (place < 0) | (place >= LENGTH)
        now = ids[np.arange(len(rows)), np.clip(place, 0, LENGTH - 1)]
        logits = model.step(cache, np.ascontiguousarray(now), waits.astype("uint8"))
        for row in np.flatnonzero(~waits):
            found[row, place[row]] = logits[row]
    assert cache["lengths"].tolist() == [LENGTH] * len(rows)
    return found


@pytest.fixture(scope="module")
def backbone():
    return network()


@pytest.fixture(scope="module")
def expected(backbone):
    return forward(backbone)


@pytest.fixture(scope="module")
def adapted():
    return network(lora=True)


@pytest.fixture(scope="module")
def adapted_expected(adapted):
    return forward(adapted)


def close(found, expected, atol=1e-4):
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


def test_steps_are_the_forward_pass(backbone, expected):
    close(steps(NativeModel(backbone), range(ROWS)), expected)


def test_steps_are_the_forward_pass_with_adapters_on_every_projection(adapted, adapted_expected, expected):
    close(steps(NativeModel(adapted), range(ROWS)), adapted_expected)
    assert np.abs(adapted_expected - expected).max() > 1


def test_steps_are_the_forward_pass_with_row_lengths_of_their_own(adapted_expected):
    backbone = network(lora=True, dora=True)
    expected = forward(backbone)
    close(steps(NativeModel(backbone), range(ROWS)), expected)
    assert np.abs(adapted_expected - expected).max() > 1


def test_adapters_that_are_not_in_effect_are_not_run(backbone, expected):
    other = network.__wrapped__(lora=True)
    other.disable_adapter()
    model = NativeModel(other)
    assert all(getattr(layer, name).rank == 0 for layer in model._layers() for name in ("q", "down"))
    close(steps(model, range(ROWS)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_logit_soft_cap": None, "final_logit_soft_cap": None},
        {"num_key_value_heads": 6, "head_dim": 32, "hidden_dim": 48, "intermediate_dim": 16},
        {"num_key_value_heads": 1, "head_dim": 2, "hidden_dim": 9, "intermediate_dim": 7, "num_layers": 1},
    ],
    ids=["no caps", "whole vectors", "less than a vector"],
)
def test_steps_are_the_forward_pass_of_other_models(options):
    backbone = network(**options)
    found, expected = steps(NativeModel(backbone), range(ROWS)), forward(backbone)
    close(found, expected, atol=1e-5 * np.abs(expected).max() + 1e-4)


def test_a_step_is_the_portable_step(backbone):
    model, step = NativeModel(backbone), Engine(backbone).program(lambda *given: decode_step(backbone, *given)[::2])
    cache, other = model.empty_cache(3, LENGTH), empty_cache(backbone, 3, LENGTH)
    # Rows of other lengths, as if rolled back to them.
    for place in range(LENGTH - 3):
        ids = np.ascontiguousarray(tokens()[:3, place])
        found = model.step(cache, ids, np.zeros(3, "uint8"))
        logits, other = step(ids, other)
        close(found, array(logits))
        if place == 5:
            cache["lengths"] -= np.asarray([0, 1, 2], "int32")
            other = {**other, "lengths": ops.convert_to_tensor(cache["lengths"].copy())}
    for pair, expected in zip(cache["layers"], other["layers"], strict=True):
        for one, same in zip(pair, expected, strict=True):
            close(one, array(same))
    assert cache["lengths"].tolist() == array(other["lengths"]).tolist() == [10, 9, 8]


@pytest.mark.parametrize("policy", ["bfloat16", "mixed_bfloat16"])
def test_half_precision_errs_no_more_than_the_portable_model(policy, adapted_expected):
    half = network(policy, lora=True)
    # What the weights say, in float32 throughout; the width's root is a whole number, which bfloat16 has too.
    exact = adapted_expected if policy == "mixed_bfloat16" else forward(network(lora=True, round_weights=True))
    model = NativeModel(half)
    assert model.empty_cache(1, 2)["layers"][0][0].dtype == "bfloat16"
    found, portable = (np.abs(logits - exact) for logits in (steps(model, range(ROWS)), forward(half)))
    assert found.mean() <= portable.mean()
    assert np.median(found) < 0.1


def test_the_embedding_factor_is_rounded_to_the_compute_dtype():
    # The root of 59 is 7.68; the nearest bfloat16 is 7.6875. Without blocks' branches it scales the logits alone.
    half = network.__wrapped__(
        "bfloat16", hidden_dim=59, num_layers=1, layer_norm_epsilon=100.0, final_logit_soft_cap=None
    )
    block = half.transformer_layers[0]
    for norm in (block.post_attention_layernorm, block.post_feedforward_layernorm):
        norm.weight.assign(-np.ones(59, "float32"))
    table, weight = (array(ops.cast(w, "float32")) for w in (half.token_embedding.embeddings, half.layer_norm.weight))
    x = table[tokens()[:, 0]].astype("float64") * 7.6875
    states = x / np.sqrt((x**2).mean(-1, keepdims=True) + 100.0) * (1 + weight)
    found = NativeModel(half).step(
        NativeModel(half).empty_cache(ROWS, 1), tokens()[:, 0].copy(), np.zeros(ROWS, "uint8")
    )
    close(found, states @ table.T, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9])
def test_a_row_does_not_notice_the_batch_around_it(adapted, rows):
    model = NativeModel(adapted)
    together = steps(model, range(rows), [row % 3 for row in range(rows)])
    for row in {0, rows // 2, rows - 1}:
        np.testing.assert_array_equal(together[row], steps(model, [row])[0])


def test_more_rows_than_a_block_of_projections():
    model = NativeModel(network(num_layers=1))
    rows = [row % ROWS for row in range(70)]
    found = steps(model, rows)
    np.testing.assert_array_equal(found, found[:ROWS][rows])


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_nothing(adapted, monkeypatch, threads):
    model = NativeModel(adapted)
    alone = steps(model, range(5))
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    np.testing.assert_array_equal(steps(model, range(5)), alone)


@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 9])
def test_logits_of_states_are_those_of_the_embedding(policy, rows):
    backbone = network(policy, num_layers=1)
    states = np.random.default_rng(2).normal(0, 2, (rows, WIDTH)).astype("float32")
    table = array(ops.cast(backbone.token_embedding.embeddings, "float32")).astype("float64")
    close(NativeModel(backbone).logits(states), 30 * np.tanh(states @ table.T / 30))
    # Of any dtype and order in memory.
    turned = np.asfortranarray(states.astype("float64"))
    np.testing.assert_array_equal(NativeModel(backbone).logits(turned), NativeModel(backbone).logits(states))


# Choosing the likeliest


def decoded(model, count, left=None, stop_ids=(), burst=LENGTH, finished=None):
    """Tokens that follow the first of each of `count` rows, at most `burst` in a call."""
    cache, now = model.empty_cache(count, LENGTH + 1), np.ascontiguousarray(tokens()[:count, 0])
    left = np.asarray([LENGTH] * count if left is None else left, "int32")
    finished = np.zeros(count, "uint8") if finished is None else np.asarray(finished, "uint8")
    made = [[] for _ in range(count)]
    while not finished.all():
        before = left.copy()
        new = model.decode(cache, now, burst, left, finished, stop_ids)
        for row, some in enumerate(before - left):
            made[row] += new[row, :some].tolist()
    return made, cache, now, left


@pytest.fixture(scope="module")
def greedy(backbone):
    """What steps and an argmax give."""
    model, made = NativeModel(backbone), tokens()[:, :1]
    cache = model.empty_cache(ROWS, LENGTH + 1)
    for _ in range(LENGTH):
        logits = model.step(cache, np.ascontiguousarray(made[:, -1]), np.zeros(ROWS, "uint8"))
        made = np.concatenate([made, logits.argmax(-1)[:, None].astype("int32")], axis=1)
    return made[:, 1:].tolist()


@pytest.mark.parametrize("burst", [1, 4, LENGTH])
@pytest.mark.parametrize("threads", [1, 3])
def test_decoding_takes_the_likeliest_token_each_time(backbone, greedy, monkeypatch, burst, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    made, cache, now, left = decoded(NativeModel(backbone), ROWS, burst=burst)
    assert made == greedy
    assert len({token for row in made for token in row}) > 5
    assert now.tolist() == [row[-1] for row in greedy]
    assert cache["lengths"].tolist() == [LENGTH] * ROWS
    assert not left.any()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_of_equal_logits_the_lowest_token_is_taken(monkeypatch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    backbone = network.__wrapped__()
    table = array(backbone.token_embedding.embeddings)
    # Every token has twins, far from one another.
    backbone.token_embedding.embeddings.assign(table[np.arange(VOCABULARY) % 12])
    made, *_ = decoded(NativeModel(backbone), ROWS)
    assert all(token < 12 for row in made for token in row)
    assert len({token for row in made for token in row}) > 2


def test_limits_end_rows(backbone, greedy):
    limits = [1, 5, 13, 2, 7]
    for burst in (3, LENGTH):
        made, cache, _, left = decoded(NativeModel(backbone), 5, limits, burst=burst)
        assert made == [row[:limit] for row, limit in zip(greedy, limits, strict=False)]
        assert cache["lengths"].tolist() == limits
        assert left.tolist() == [0] * 5


@pytest.mark.parametrize("burst", [1, 4, LENGTH])
def test_stop_tokens_end_rows_and_are_made(backbone, greedy, burst):
    stop_ids = (greedy[0][6], greedy[3][2])

    def cut(row):
        ends = [i for i, token in enumerate(row) if token in stop_ids]
        return row[: ends[0] + 1] if ends else row

    made, cache, *_ = decoded(NativeModel(backbone), ROWS, stop_ids=stop_ids, burst=burst)
    assert made == [cut(row) for row in greedy]
    assert len({len(row) for row in made}) > 1
    assert cache["lengths"].tolist() == [len(row) for row in made]


def test_a_call_ends_once_all_rows_have(backbone):
    model = NativeModel(backbone)
    new = model.decode(
        model.empty_cache(2, LENGTH),
        tokens()[:2, 0].copy(),
        LENGTH,
        np.asarray([3, 2], "int32"),
        np.zeros(2, "uint8"),
        (),
    )
    assert new.shape == (2, 3)


def test_finished_rows_stay_as_they_are(backbone):
    model = NativeModel(backbone)
    cache = model.empty_cache(3, LENGTH)
    for place in range(5):
        model.step(cache, tokens()[:3, place].copy(), np.zeros(3, "uint8"))
    before = keras.tree.map_structure(np.copy, cache)
    now, left = tokens()[:3, 5].copy(), np.asarray([4, 9, 4], "int32")
    finished = np.asarray([0, 1, 0], "uint8")
    model.decode(cache, now, 4, left, finished, ())
    model.step(cache, now, np.asarray([0, 1, 1], "uint8"))
    assert finished.tolist() == [1, 1, 1]
    assert left.tolist() == [0, 9, 0]
    assert cache["lengths"].tolist() == [10, 5, 9]
    assert now[1] == tokens()[1, 5]
    for pair, earlier in zip(cache["layers"], before["layers"], strict=True):
        for buffer, old in zip(pair, earlier, strict=True):
            np.testing.assert_array_equal(buffer[1], old[1])
            assert (buffer[0] != old[0]).any()


# Where the kernels run


@pytest.mark.parametrize(
    ("policy", "supported"),
    [("float32", True), ("bfloat16", True), ("mixed_bfloat16", True), ("float16", False), ("mixed_float16", False)],
)
def test_the_kernels_run_what_they_have_numbers_for(policy, supported):
    assert is_supported(network(policy, num_layers=1)) is supported


def test_without_a_library_nothing_is_supported(backbone, monkeypatch):
    assert is_supported(backbone)
    monkeypatch.setattr(native, "library", lambda: None)
    assert not is_supported(backbone)


def test_weights_elsewhere_than_in_the_memory_of_the_cpu_are_not_supported(backbone, monkeypatch):
    monkeypatch.setattr(native, "is_on_cpu", lambda tensor: False)
    assert not is_supported(backbone)


def test_weights_are_read_where_they_lie(backbone):
    model = NativeModel(backbone)
    for variable, where in (
        (backbone.token_embedding.embeddings, model._model.embedding),
        (backbone.transformer_layers[2].feed_forward.down_proj.weight, model._model.layer[2].down.weight),
    ):
        assert native.address(stored(variable))[0] == where
