"""Regular expressions that come from a file: which of them may run at all."""

from __future__ import annotations

import re

LONGEST, LONGEST_PLAIN = 2000, 100_000
"""Letters of an expression with repeats, and of one without."""
REPEATS = 4
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,\d*\}|[*+)]|.", re.DOTALL)


def simple(pattern: str) -> bool:
    """True if it is an expression whose matching takes little time: at most four open repeats, none over a group.

    A repeat over a group can take exponential time, and many repeats a high polynomial.
    """
    if len(pattern) > LONGEST_PLAIN:
        return False
    repeats, after_group = 0, False
    for token in _TOKEN.findall(pattern):
        if token in "*+" or (token[0] == "{" and len(token) > 1):
            if after_group:
                return False
            repeats += 1
        after_group = token == ")"
    return repeats <= REPEATS and (not repeats or len(pattern) <= LONGEST) and _compiles(pattern)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def exactly(name: str) -> str:
    """The pattern that matches this one whole name."""
    return "^" + re.escape(name)


def alternatives(names: list[str]) -> str:
    """One regular expression that matches exactly these whole names."""
    return "|".join(re.escape(name) for name in names)
