from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies

from gemma2_keras import Gemma2Config, sizes
from gemma2_keras.generation import engine

pytestmark = pytest.mark.once


@strategies.composite
def configs(draw) -> Gemma2Config:
    small = strategies.integers(1, 40)
    heads = draw(strategies.integers(1, 4))
    return Gemma2Config(
        draw(small), draw(small), heads * draw(strategies.integers(1, 4)), heads, draw(small), draw(small),
        2 * draw(small), sliding_window_size=draw(small),
    )  # fmt: skip


@hypothesis.given(configs())
def test_the_parts_are_the_whole(config):
    assert sum(sizes.parameter_parts(config).values()) == config.parameter_count


@hypothesis.given(configs(), strategies.integers(1, 5), strategies.integers(1, 200))
def test_a_cache_never_holds_more_than_all_layers_in_full(config, rows, length):
    size = sizes.cache_bytes(config, rows, length, "float32")
    full = rows * 2 * config.num_key_value_heads * config.head_dim * 4 * config.num_layers * length
    assert size == engine.cache_bytes(config, rows, length, "float32") <= full
    assert (size == full) == (length <= config.sliding_window_size + sizes.SPARE)


@hypothesis.given(strategies.integers(1, 100_000))
def test_a_bucket_is_a_power_of_two_that_holds_the_length(length):
    size = sizes.bucket(length)
    assert size >= max(length, 64)
    assert size & (size - 1) == 0
    assert size == 64 or size < 2 * length


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", (4, 4)),
        ("bfloat16", (2, 2)),
        ("float16", (2, 2)),
        ("mixed_bfloat16", (4, 2)),
        ("mixed_float16", (4, 2)),
    ],
)
def test_bytes_of_a_number(dtype, expected):
    assert sizes.precision(dtype) == expected


@pytest.mark.parametrize("dtype", ["float64", "int8", "mixed_float32", "mixed_", "", None, "x" * 100])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"`dtype` must be one of float32.*given .{0,42}\.$"):
        sizes.precision(dtype)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (99_400, "99.4 kB"), (1.5e8, "150 MB"), (3e12, "3.00 TB")],
)
def test_sizes_for_people(size, text):
    assert sizes.readable(size) == text
