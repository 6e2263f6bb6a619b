from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma2_keras.training.packing import pack

pytestmark = pytest.mark.once


@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.lists(st.integers(1, c), max_size=60), st.just(c))))
def test_every_example_is_in_one_row_and_no_row_is_overfull(case):
    lengths, capacity = case
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < load <= capacity for load in loads)
    # A row is begun only where no other has room for the example.
    longest = max(lengths, default=1)
    assert sum(load <= capacity - longest for load in loads) <= 1
    assert len(rows) <= 1 + sum(lengths) // (capacity - longest + 1)
    assert pack(lengths, capacity) == rows


def by_search(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing, each time looking at every row."""
    rows: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [capacity - sum(lengths[j] for j in row) for row in rows]
        fits = [r for r, room in enumerate(rooms) if room >= lengths[i]]
        if fits:
            rows[min(fits, key=lambda r: rooms[r])].append(i)
        else:
            rows.append([i])
    return rows


@given(st.lists(st.integers(1, 17), max_size=40))
def test_rooms_are_as_full_as_a_search_of_all_rows_leaves_them(lengths):
    found, expected = (
        sorted(sorted(lengths[i] for i in row) for row in rows(lengths, 17)) for rows in (pack, by_search)
    )
    assert len(found) == len(expected)
    assert sorted(map(sum, found)) == sorted(map(sum, expected))


def test_time_grows_little_faster_than_the_number_of_examples():
    lengths = np.random.default_rng(0).integers(1, 1024, 100_000).tolist()
    began = time.perf_counter()
    rows = pack(lengths, 1024)
    # Two seconds on a slow core; looking at every row would take hours.
    assert time.perf_counter() - began < 60
    assert sum(lengths) / (1024 * len(rows)) > 0.99


@pytest.mark.parametrize("lengths", [[0], [3, 8], [-1]])
def test_a_length_that_fits_nowhere_is_refused(lengths):
    with pytest.raises(ValueError, match="must lie between 1 and 7"):
        pack(lengths, 7)
