"""Kinds of values that settings share: hints that say which numbers and texts are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Within:
    """Numbers from `least` to `most`; with `open_below`, `open_above` that end itself is left out. None: no bound."""

    least: float | None = None
    most: float | None = None
    open_below: bool = False
    open_above: bool = False

    def __call__(self, value: Any) -> bool:
        above = self.least is None or (value > self.least if self.open_below else value >= self.least)
        below = self.most is None or (value < self.most if self.open_above else value <= self.most)
        return above and below

    def words(self, of: str) -> str:
        """What is taken, `of` being "a number" or "a whole number"."""
        above = "" if self.least is None else f" {'above' if self.open_below else 'from'} {self.least:,}"
        below = "" if self.most is None else f" {'to below' if self.open_above else 'to'} {self.most:,}"
        return of + above + (below or ("" if self.open_below else " on"))


@dataclass(frozen=True)
class Where:
    """Values that `test` takes; `holds` says in words what these are, `{}` being any value of that type."""

    holds: str
    test: Callable[[Any], bool]

    def __call__(self, value: Any) -> bool:
        return self.test(value)

    def words(self, of: str) -> str:
        """What is taken."""
        return self.holds.format(of)


LARGEST_RANK = 1 << 16
Rank = Annotated[int, Within(1, LARGEST_RANK)]
"""Rank of a factor pair: no layer has more rows than the upper bound."""
Count = Annotated[int, Within(1, 1 << 31)]
"""How many of something, at least one."""
Steps = Annotated[int, Within(0, 1 << 31)]
"""A number of steps, or of things that may be none."""
Seed = Annotated[int, Within(0, (1 << 63) - 1)]
Positive = Annotated[float, Within(0, open_below=True)]
NotNegative = Annotated[float, Within(0)]
Probability = Annotated[float, Within(0, 1, open_above=True)]
"""From 0 up to, not including, 1."""
NOT_EMPTY = Where("{}, at least one", bool)
