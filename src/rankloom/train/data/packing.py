"""Several examples in one row: best fit."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from rankloom.train.data.lazy import Lazy

Numbers = np.ndarray[Any, Any]


class Packs(Lazy[tuple[int, ...]]):
    """Rows of indices: those of `items` [n] between the `ends` [rows + 1]."""

    def __init__(self, items: Numbers, ends: Numbers) -> None:
        self.items, self.ends = items, ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def at(self, index: int) -> tuple[int, ...]:
        return tuple(self.items[self.ends[index] : self.ends[index + 1]].tolist())


def singles(n: int) -> Packs:
    """A row for each of n examples."""
    return Packs(np.arange(n), np.arange(n + 1))


def best_fit(lengths: Sequence[int] | Numbers, capacity: int) -> Packs:
    """Rows of at most `capacity`: every item, in order, goes where it leaves the least room, into the oldest such row.

    The rows of each free size are a list, and a bit for each size that has one finds the smallest that fits.
    """
    free: list[deque[int]] = [deque() for _ in range(capacity + 1)]
    sizes, row_of, rows = 0, np.empty(len(lengths), dtype=np.int64), 0
    for item, length in enumerate(np.asarray(lengths).tolist()):
        if length > capacity:
            raise ValueError(f"item {item} of length {length} does not fit {capacity}")
        fitting = sizes >> length
        if fitting:
            size = length + (fitting & -fitting).bit_length() - 1
            row = free[size].popleft()
            if not free[size]:
                sizes &= ~(1 << size)
        else:
            size, row, rows = capacity, rows, rows + 1
        row_of[item] = row
        if size > length:
            free[size - length].append(row)
            sizes |= 1 << (size - length)
    order = np.argsort(row_of, kind="stable")
    return Packs(order, np.searchsorted(row_of[order], np.arange(rows + 1)))


def joined(packs: Sequence[Packs], starts: Sequence[int]) -> Packs:
    """The rows of several, whose indices begin at `starts`."""
    ends = np.cumsum([0, *(len(p.items) for p in packs)])
    return Packs(
        np.concatenate([p.items + start for p, start in zip(packs, starts)]),
        np.concatenate([np.zeros(1, np.int64), *(p.ends[1:] + end for p, end in zip(packs, ends))]),
    )
