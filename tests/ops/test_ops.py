"""Each function against the same formula in NumPy, in float64."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

from gemma2_keras.ops.attention import attention, soft_cap
from gemma2_keras.ops.cache import tokens_at_slots, write_slots
from gemma2_keras.ops.feed_forward import gated_gelu
from gemma2_keras.ops.masks import PADDING, causal_mask, positions_from_mask, segment_mask
from gemma2_keras.ops.norm import rms_norm
from gemma2_keras.ops.rotary import apply_rotary, rotary_tables

array = ops.convert_to_numpy


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype("float32")


def close(found, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(array(found).astype("float64"), expected, rtol=rtol, atol=atol)


# Norm


def test_rms_norm_divides_by_the_root_mean_square_and_scales_by_one_plus_weight():
    x, weight = normal(2, 3, 8), normal(8, seed=1)
    expected = x / np.sqrt((x.astype("float64") ** 2).mean(-1, keepdims=True) + 0.1) * (1 + weight)
    close(rms_norm(ops.convert_to_tensor(x), ops.convert_to_tensor(weight), 0.1), expected)


@pytest.mark.parametrize(("dtype", "step"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_rms_norm_rounds_once_at_the_end(dtype, step):
    x, weight = ops.cast(normal(4, 64), dtype), ops.cast(normal(64, seed=1), dtype)
    exact, scale = array(ops.cast(x, "float32")).astype("float64"), 1 + array(ops.cast(weight, "float32"))
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * scale
    found = rms_norm(x, weight, 1e-6)
    assert found.dtype == x.dtype
    # Half a unit in the last place, and float32's own error.
    close(ops.cast(found, "float32"), expected, rtol=step * 1.001, atol=1e-7)


def test_rms_norm_squares_beyond_the_range_of_float16():
    assert array(rms_norm(ops.full((1, 4), 1000.0, "float16"), ops.zeros(4), 1e-6)).tolist() == [[1, 1, 1, 1]]


# Rotary embedding


def test_rotary_tables_turn_faster_in_earlier_pairs():
    positions = np.array([[0, 1, 7], [2, 500, 8191]])
    cosine, sine = rotary_tables(ops.convert_to_tensor(positions), 6, 100.0)
    angles = positions[:, :, None, None] * np.array([1, 100 ** (-2 / 6), 100 ** (-4 / 6)])
    # An angle of 8191 has a float32 spacing of 5e-4.
    close(cosine, np.cos(angles), atol=6e-4)
    close(sine, np.sin(angles), atol=6e-4)
    close(cosine[0], np.cos(angles[0]))


def test_negative_positions_are_not_turned():
    cosine, sine = rotary_tables(ops.convert_to_tensor([[-1, 0]]), 4, 10_000.0)
    assert array(cosine).tolist() == np.ones((1, 2, 1, 2)).tolist()
    assert array(sine).tolist() == np.zeros((1, 2, 1, 2)).tolist()


def test_apply_rotary_turns_halves_as_complex_numbers():
    x, angles = normal(2, 3, 2, 8), normal(2, 3, 1, 4, seed=1)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    found = apply_rotary(
        ops.convert_to_tensor(x), ops.convert_to_tensor(np.cos(angles)), ops.convert_to_tensor(np.sin(angles))
    )
    close(found, np.concatenate([turned.real, turned.imag], -1))


@given(st.integers(0, 4000), st.integers(0, 90))
def test_products_depend_on_the_distance_of_positions_only(start, distance):
    query, key = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def product(first, second):
        turned = [
            array(
                apply_rotary(ops.convert_to_tensor(x), *rotary_tables(ops.convert_to_tensor([[position]]), 8, 10_000.0))
            )
            for x, position in ((query, first), (key, second))
        ]
        return (turned[0] * turned[1]).sum()

    assert product(start + distance, start) == pytest.approx(product(distance, 0), abs=5e-3)


def test_apply_rotary_keeps_the_dtype():
    cosine, sine = rotary_tables(ops.convert_to_tensor([[3]]), 4, 10_000.0)
    assert apply_rotary(ops.ones((1, 1, 2, 4), "bfloat16"), cosine, sine).dtype == ops.ones(1, "bfloat16").dtype


# Attention


@given(st.floats(-1e4, 1e4, width=32), st.floats(0.5, 100, width=32))
def test_soft_cap_is_a_scaled_tanh(x, cap):
    assert float(array(soft_cap(ops.convert_to_tensor(np.float32(x)), cap))) == pytest.approx(
        cap * math.tanh(x / cap), rel=1e-5, abs=1e-6
    )


def test_no_cap_changes_nothing():
    x = normal(3)
    assert soft_cap(x, None) is x


def attention_by_loops(query, key, value, mask, scale, cap):
    query, key, value = (x.astype("float64") for x in (query, key, value))
    out = np.zeros(query.shape)
    group = query.shape[2] // key.shape[2]
    for b, t, n in np.ndindex(query.shape[:3]):
        seen = np.flatnonzero(mask[b, t])
        scores = key[b, seen, n // group] @ query[b, t, n] * scale
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ value[b, seen, n // group]
    return out


@pytest.mark.parametrize("key_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_attention_is_that_of_loops(key_heads, cap):
    query = normal(2, 5, 6, 4, scale=3.0)
    key, value = normal(2, 7, key_heads, 4, seed=1), normal(2, 7, key_heads, 4, seed=2)
    mask = np.random.default_rng(3).random((2, 5, 7)) < 0.5
    mask[:, :, 2] = True
    found = attention(*map(ops.convert_to_tensor, (query, key, value, mask)), 0.7, cap)
    close(found, attention_by_loops(query, key, value, mask, 0.7, cap), atol=1e-5)


def test_attention_over_a_single_key_is_its_value():
    query, key, value = normal(2, 3, 4, 8), normal(2, 1, 2, 8, seed=1), normal(2, 1, 2, 8, seed=2)
    found = attention(*map(ops.convert_to_tensor, (query, key, value, np.ones((2, 3, 1), bool))), 1.0, 50.0)
    close(found, np.repeat(np.repeat(value, 2, axis=2), 3, axis=1))


def test_a_query_that_sees_nothing_stays_finite():
    query, key = normal(1, 2, 2, 4), normal(1, 3, 1, 4)
    mask = np.array([[[False] * 3, [True] * 3]])
    assert np.isfinite(array(attention(*map(ops.convert_to_tensor, (query, key, key, mask)), 1.0, 50.0))).all()


def test_attention_keeps_half_precision_but_not_inside():
    query, key = (ops.cast(normal(1, 6, 2, 64, seed=i, scale=4.0), "bfloat16") for i in (0, 1))
    mask = np.tril(np.ones((1, 6, 6), bool))
    found = attention(query, key, key, ops.convert_to_tensor(mask), 0.1, 50.0)
    assert found.dtype == query.dtype
    exact = attention_by_loops(*(array(ops.cast(x, "float32")) for x in (query, key, key)), mask, 0.1, 50.0)
    # The scores, of up to 8 bits before the point, and the weights are rounded once each.
    close(ops.cast(found, "float32"), exact, rtol=0, atol=0.02 * np.abs(exact).max())


# Masks


def test_positions_count_real_tokens():
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    expected = [[0, 1, 2, 3], [-1, -1, 0, 1], [0, 1, -1, -1], [-1, 0, 1, -1], [-1, -1, -1, -1]]
    for dtype in ("int32", "bool", "float32"):
        found = positions_from_mask(segment_mask(mask.astype(dtype)))
        assert array(found).tolist() == expected
        assert keras.backend.standardize_dtype(found.dtype) == "int32"


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3))
def test_segments_see_and_count_their_own_tokens(rows):
    seen = segment_mask(np.array(rows, "int32"))
    expected = [[[row[t] != 0 and row[t] == row[s] and s <= t for s in range(6)] for t in range(6)] for row in rows]
    assert array(seen).tolist() == expected
    counted = [[row[:t].count(row[t]) if row[t] else PADDING for t in range(6)] for row in rows]
    assert array(positions_from_mask(seen)).tolist() == counted


@given(
    st.lists(st.integers(-1, 9), min_size=3, max_size=3),
    st.lists(st.integers(-1, 9), min_size=5, max_size=5),
    st.sampled_from([None, 1, 2, 3, 20]),
)
def test_causal_mask_is_that_of_loops(queries, keys, window):
    found = causal_mask(ops.convert_to_tensor([queries], "int32"), ops.convert_to_tensor([keys], "int32"), window)
    expected = [
        [key != -1 and key <= query and (window is None or query - key < window) for key in keys] for query in queries
    ]
    assert array(found)[0].tolist() == expected


# Feed-forward


def test_gated_gelu_is_the_tanh_approximation():
    gate, up = normal(4, 9, scale=3.0), normal(4, 9, seed=1)
    gelu = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate.astype("float64") ** 3)))
    found = gated_gelu(ops.convert_to_tensor(gate), ops.convert_to_tensor(up))
    close(found, gelu * up, atol=5e-6)
    exact = np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))))(gate.astype("float64")) * up
    distance = np.abs(array(found) - exact)
    assert 1e-4 < distance.max() < 2e-3  # near the one with erf, and not the same


# Caches


def ring(length, slots):
    """The positions that a ring holds once so many tokens were written one after the other."""
    held = [PADDING] * slots
    for position in range(length):
        held[position % slots] = position
    return held


@given(st.lists(st.integers(0, 60), min_size=3, max_size=3), st.integers(1, 17))
def test_slots_hold_the_tokens_written_last(lengths, slots):
    found = array(tokens_at_slots(ops.convert_to_tensor(lengths, "int32"), slots))
    assert found.dtype == "int32"
    assert found.tolist() == [ring(length, slots) for length in lengths]


@given(st.lists(st.integers(0, 4), min_size=3, max_size=3), st.sampled_from(["float32", "bfloat16"]))
def test_one_slot_of_each_row_is_written(slots, dtype):
    # Numbers that bfloat16 has, too.
    buffer = np.arange(3 * 5 * 2 * 4, dtype="float32").reshape(3, 5, 2, 4)
    values = -1.0 - np.arange(3 * 2 * 4, dtype="float32").reshape(3, 1, 2, 4)
    found = write_slots(ops.cast(buffer, dtype), ops.convert_to_tensor(slots, "int32"), ops.convert_to_tensor(values))
    expected = buffer.copy()
    expected[np.arange(3), slots] = values[:, 0]
    np.testing.assert_array_equal(array(ops.cast(found, "float32")), expected)
    assert found.dtype == ops.cast(buffer, dtype).dtype
