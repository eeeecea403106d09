"""A named check of the contract, and the table of what came of all of them."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rankloom.errors import MissingExtra
from rankloom.testing.subject import Subject, Unfit

ELSEWHERE = ("/torch/", "/rankloom/core/", "/rankloom/testing/", "<")
Promise = Callable[[Subject], None]


@dataclass(frozen=True)
class Check:
    """One promise of the contract, to be called: returns None, or raises `AssertionError` that says what is broken.

    It leaves random numbers as they were. `promise` says in a line what a method promises.
    """

    name: str
    promise: str
    body: Callable[[], None]
    method: str

    def __call__(self) -> None:
        if not __debug__:
            raise Unfit("python -O takes the assertions out of the contract: run it without -O")
        from rankloom.train.rng import seed_all, untouched_rng

        with untouched_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seed_all(0)
            try:
                self.body()
            except AssertionError as error:
                raise AssertionError(f"{self.method} breaks {self.name!r} ({self.promise}). {error}") from error
            except (Unfit, MissingExtra):
                raise
            except Exception as error:
                raise AssertionError(
                    f"{self.method} breaks {self.name!r} ({self.promise}). {type(error).__name__}: {_first(error)}"
                    f"{_where(error)}"
                ) from error

    def __repr__(self) -> str:
        return f"Check({self.name!r})"


def _first(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return line if len(line) <= 400 else f"{line[:399]}…"


def _where(error: Exception) -> str:
    """The innermost frame that is neither torch's nor the mechanism's: most often the method's own."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(part in f.filename for part in ELSEWHERE)]
    frame = (own or frames)[-1]
    return f" [{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}, in {frame.name}]"


@dataclass(frozen=True)
class Row:
    """What came of one check: `fault` is None where it held."""

    name: str
    fault: str | None
    seconds: float


@dataclass(frozen=True)
class Report:
    """The whole contract of one method; printed as a table."""

    method: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """True where every check held."""
        return not self.failed

    @property
    def failed(self) -> tuple[Row, ...]:
        """The checks that did not hold."""
        return tuple(row for row in self.rows if row.fault is not None)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        head = f"{self.method}: {len(self.rows) - len(self.failed)} of {len(self.rows)} hold"
        lines = [f"  {row.name:<{width}}  {row.seconds:6.2f} s  {row.fault or 'holds'}" for row in self.rows]
        return "\n".join([head, *lines])


def report(method: str, checks: list[Check]) -> Report:
    """Call every check, and go on after one that fails."""
    rows = []
    for check in checks:
        began = time.perf_counter()
        try:
            check()
            fault = None
        except AssertionError as error:
            fault = str(error)
        rows.append(Row(check.name, fault, time.perf_counter() - began))
    return Report(method, tuple(rows))
