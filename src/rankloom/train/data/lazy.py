"""Sequences that are computed when they are read: their memory does not grow with what they hold."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, Generic, TypeVar

import numpy as np

S = TypeVar("S")
T = TypeVar("T")


class Lazy(Sequence[T], Generic[T]):
    """A sequence that knows its length and gives its items one by one; slices are tuples."""

    def at(self, index: int) -> T:
        """The item at an index from 0."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self.at(i) for i in range(*index.indices(len(self))))
        found = index + len(self) if index < 0 else index
        if not 0 <= found < len(self):
            raise IndexError(f"index {index} of {len(self)}")
        return self.at(found)

    def __iter__(self) -> Iterator[T]:
        return map(self.at, range(len(self)))


class Mapped(Lazy[T], Generic[S, T]):
    """`function` of each item."""

    def __init__(self, items: Sequence[S], function: Callable[[S], T]) -> None:
        self.items, self.function = items, function

    def __len__(self) -> int:
        return len(self.items)

    def at(self, index: int) -> T:
        return self.function(self.items[index])

    def __iter__(self) -> Iterator[T]:
        return map(self.function, self.items)


class Picked(Lazy[T]):
    """The items at some indices, in their order."""

    def __init__(self, items: Sequence[T], indices: Sequence[int] | np.ndarray[Any, Any]) -> None:
        self.items, self.indices = items, np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def at(self, index: int) -> T:
        return self.items[int(self.indices[index])]


class Chained(Lazy[T]):
    """The items of several sequences, one after the other."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def at(self, index: int) -> T:
        part = bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[T]:
        return chain.from_iterable(self.parts)
