"""Several examples in one row: first-fit."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Rows of indices into `lengths`, each row at most `capacity` long: every item goes into the first row with room.

    A tournament tree over the free space finds that row in O(log n).
    """
    leaves = 1 << max(0, (len(lengths) - 1).bit_length())
    free = [capacity] * (2 * leaves)
    rows: list[list[int]] = []
    for item, length in enumerate(lengths):
        if length > capacity:
            raise ValueError(f"item {item} of length {length} does not fit {capacity}")
        node = 1
        while node < leaves:
            node = 2 * node if free[2 * node] >= length else 2 * node + 1
        row = node - leaves
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        free[node] -= length
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return [tuple(row) for row in rows]
