"""Rows of the board: a promise, how it is measured, and the sabotages under which the measurement must fail."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from rankloom.errors import SettingsError

SEED = 20260
PLACES = ("reliability_board.files", "reliability_board.training")
NAMED = re.compile(r"row(\d\d)_\w+")


@dataclass(frozen=True)
class Budget:
    """How much a measurement may try: all of it, or the quick part; the seed of everything random in it."""

    quick: bool = False
    seed: int = SEED

    def of(self, full: int, quick: int) -> int:
        """The count for this budget."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Finding:
    """What a measurement found: whether the promise holds, the figure in words, and each case that broke it."""

    ok: bool
    figure: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sabotage:
    """One deliberate defect of the product: while `apply()` is entered, the row's measurement must find it."""

    name: str
    apply: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Row:
    """A promise with its number on the board."""

    number: int
    promise: str
    measure: Callable[[Budget], Finding]
    sabotages: tuple[Sabotage, ...]


@dataclass(frozen=True)
class Result:
    """A row as measured. `green`: sabotages that the measurement did not find; None if none was applied."""

    row: Row
    finding: Finding
    green: tuple[str, ...] | None
    seconds: float

    @property
    def sabotage_red(self) -> bool | None:
        """True if every sabotage turned the row red; None if none was applied."""
        return None if self.green is None else not self.green

    @property
    def ok(self) -> bool:
        """The promise holds, and its measurement is no sham as far as that was tried."""
        return self.finding.ok and not self.green

    def data(self) -> dict[str, Any]:
        """One row of the JSON."""
        return {
            "row": self.row.number,
            "promise": self.row.promise,
            "ok": self.finding.ok,
            "figure": self.finding.figure,
            "sabotage_red": self.sabotage_red,
        }


def numbers() -> list[int]:
    """Numbers of the rows that there are; no row is imported."""
    return sorted(_modules())


def row(number: int) -> Row:
    """One row: `ROW` of the module `row<number>_<name>` in `files` or `training`."""
    found = _modules()
    if number not in found:
        raise SettingsError(f"there is no row {number} on the board; there are {', '.join(map(str, sorted(found)))}")
    made: Row = importlib.import_module(found[number]).ROW
    return made


def rows() -> Iterator[Row]:
    """Every row in order, each imported as it comes."""
    return map(row, numbers())


def run(row: Row, budget: Budget, sabotage: bool = False) -> Result:
    """Measure a row; with `sabotage`, measure it again under each of its sabotages, with the quick budget."""
    start = time.perf_counter()
    finding = row.measure(budget)
    green = tuple(s.name for s in row.sabotages if _green(row, s, budget.seed)) if sabotage else None
    return Result(row, finding, green, time.perf_counter() - start)


@contextlib.contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside: what most sabotages are made of. Children forked inside see it too."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def _green(row: Row, sabotage: Sabotage, seed: int) -> bool:
    with sabotage.apply():
        return row.measure(Budget(quick=True, seed=seed)).ok


def _modules() -> dict[int, str]:
    found = {}
    for place in PLACES:
        for module in pkgutil.iter_modules(importlib.import_module(place).__path__):
            if named := NAMED.fullmatch(module.name):
                found[int(named[1])] = f"{place}.{module.name}"
    return found
