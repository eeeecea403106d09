"""Errors of the library: each message names the thing, the value, the nearest valid one and the next step."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that command a terminal, turn the direction of writing, or are none; newline and tab are not among them.
"""


def printable(text: str) -> str:
    """`text` with every control character written out, as `\\x1b`: safe to show in a terminal."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """`text` in one line that is safe to show."""
    return printable(" ".join(text.split()))


class RankloomError(Exception):
    """Base of every error that Rankloom raises on purpose; its text holds no control characters."""

    def __str__(self) -> str:
        return printable(super().__str__())


class SettingsError(RankloomError, ValueError):
    """A setting is unknown, has the wrong type, or contradicts another. `path`: of the setting, where it is known;
    `advised`: the message says what to write.
    """

    def __init__(self, message: str = "", path: str = "", *, advised: bool = False) -> None:
        super().__init__(message)
        self.path = path
        self.advised = advised


class TargetError(RankloomError, ValueError):
    """A target matched nothing, or matched something that cannot be adapted."""


class NotMergeable(RankloomError, TypeError):
    """The change has no single matrix: it depends on the input, or it is not linear in it."""


class UnreachedError(RankloomError, RuntimeError):
    """An adapter is attached where the model never listens."""


class StateError(RankloomError, RuntimeError):
    """The call does not fit the present state of the model or bank (merged, detached, unknown adapter …)."""


class FileError(RankloomError, ValueError):
    """A file is missing, broken, or says something that cannot be."""


class DataError(RankloomError, ValueError):
    """A training example cannot be read; names file, line and field."""


class MissingExtra(RankloomError, ImportError):
    """An optional package is not installed; names the extra that brings it."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(f"{what} needs the package {package!r}: pip install 'rankloom[{extra}]'")


class Terminated(SystemExit):
    """A signal ended a run whose checkpoint is complete; uncaught, the program exits with 128 + its number.

    143 for SIGTERM, 129 for SIGHUP, 138 for SIGUSR1 (on Linux).
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(128 + number)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Interrupted(KeyboardInterrupt):
    """SIGINT ended a run whose checkpoint is complete; uncaught, the program exits as by Ctrl-C (130)."""


def suggest(name: str, known: Iterable[str], *, n: int = 3, all_of_few: bool = True) -> str:
    """``"; did you mean 'a' or 'b'?"`` for the nearest of `known`, or (`all_of_few`) the list of what there is if it is
    short, or ``""``.
    """
    pool = sorted({str(k) for k in known})
    near = difflib.get_close_matches(name, pool, n=n, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(repr(x) for x in near) + "?"
    if all_of_few and pool and len(pool) <= 20:
        return "; there is " + ", ".join(repr(x) for x in pool)
    return ""
