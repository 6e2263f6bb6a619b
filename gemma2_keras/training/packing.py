"""Short examples side by side in full sequences."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Place examples into few rows: the longest first, each where the least room stays (best-fit decreasing).

    At most 11/9 of the fewest possible rows, and 6/9 of a row more; in practice nearly the fewest. n examples take
    n log(n) + n log(capacity) steps.

    Args:
        lengths: of the examples, each from 1 to `capacity`.
        capacity: what a row holds.

    Returns:
        For each row, the indices of its examples. The same lengths always give the same rows.

    Raises:
        ValueError: if a length is out of its range.

    Example:

    >>> pack([2, 5, 3, 4, 1], 6)
    [[1, 4], [3, 0], [2]]

    Source: Johnson (1973), Near-optimal bin packing algorithms; for examples of a language model, with a tree of the
    rooms, Ding et al. (https://arxiv.org/abs/2404.10830).
    """
    outside = [length for length in lengths if not 1 <= length <= capacity]
    if outside:
        raise ValueError(f"Lengths must lie between 1 and {capacity}; given {outside[0]}.")
    rows: list[list[int]] = []
    rooms = _Rooms(capacity)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[i]
        room, row = rooms.take(length)
        if row is None:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(i)
        rooms.put(room - length, row)
    return rows


class _Rooms:
    """Rows by the room that is left in them; the least that is enough is found in log(capacity) steps.

    A binary tree in an array: the leaf of a room holds the room itself while some row has it, and otherwise 0; a node
    holds the larger of its two children.
    """

    def __init__(self, capacity: int) -> None:
        self._leaves = 1 << capacity.bit_length()
        self._tree = [0] * (2 * self._leaves)
        self._rows: list[list[int]] = [[] for _ in range(capacity + 1)]

    def put(self, room: int, row: int) -> None:
        """Note a row with so much room."""
        self._rows[room].append(row)
        self._set(room, room)

    def take(self, length: int) -> tuple[int, int | None]:
        """Take out a row with the least room that `length` fits in; its room and number, or 0 and `None`."""
        if self._tree[1] < length:
            return 0, None
        node = 1
        while node < self._leaves:
            node *= 2
            if self._tree[node] < length:
                node += 1
        room = node - self._leaves
        row = self._rows[room].pop()
        if not self._rows[room]:
            self._set(room, 0)
        return room, row

    def _set(self, room: int, value: int) -> None:
        node = self._leaves + room
        self._tree[node] = value
        while node > 1:
            node //= 2
            self._tree[node] = max(self._tree[2 * node], self._tree[2 * node + 1])
