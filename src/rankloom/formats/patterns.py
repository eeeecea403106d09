"""Regular expressions that come from a file: which of them may run at all."""

from __future__ import annotations

import re

LONGEST = 2000
REPEATS = 4
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d*,\d*\}|[*+)]|.", re.DOTALL)


def simple(pattern: str) -> bool:
    """True if matching takes little time for every name: at most four open repeats, none of them over a group.

    A repeat over a group can take exponential time, and many repeats a high polynomial.
    """
    repeats, after_group = 0, False
    for token in _TOKEN.findall(pattern):
        if token in "*+" or (token[0] == "{" and len(token) > 1):
            if after_group:
                return False
            repeats += 1
        after_group = token == ")"
    return repeats <= REPEATS and (not repeats or len(pattern) <= LONGEST)


def exactly(name: str) -> str:
    """The pattern that matches this one whole name."""
    return "^" + re.escape(name)


def alternatives(names: list[str]) -> str:
    """One regular expression that matches exactly these whole names."""
    return "|".join(re.escape(name) for name in names)
