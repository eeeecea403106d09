"""Regular expressions that come from a file: which of them are run."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rankloom.core.patterns import cheap, check, check_searched
from rankloom.errors import FileError, SettingsError

LONGEST, LONGEST_COSTLY = 100_000, 4_000
"""Letters of all expressions of one field together, and of those with many ways to match."""


def fault(expressions: Iterable[str], searched: bool = False) -> str | None:
    """Why these expressions of one field are not run, if they are not. `searched`: for a place within a name."""
    letters = costly = 0
    for expression in expressions:
        letters += len(expression)
        if letters > LONGEST:
            return f"regular expressions of more than {LONGEST:,} letters"
        try:
            (check_searched if searched else check)(expression)
            costly += 0 if cheap(expression) else len(expression)
        except re.error as error:
            return f"{expression[:80]!r} is no regular expression ({error})"
        except SettingsError as error:
            return str(error)
        if costly > LONGEST_COSTLY:
            return f"regular expressions with many ways to match, of more than {LONGEST_COSTLY:,} letters"
    return None


def check_expressions(field: str, expressions: Iterable[str], where: str, searched: bool = False) -> None:
    """Refuse a field of a file whose expressions are not run. Raises `FileError`."""
    if found := fault(expressions, searched):
        raise FileError(f"{where}: {field}: {found}; name the modules instead")


def exactly(name: str) -> str:
    """The pattern that matches this one whole name."""
    return "^" + re.escape(name)


def alternatives(names: list[str]) -> str:
    """One regular expression that matches exactly these whole names."""
    return "|".join(re.escape(name) for name in names)
