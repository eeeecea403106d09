"""One question with its answer, and the type of what draws them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Item:
    """`key` names what is asked, free of phrasing: it decides the split. `prompt` and `answer` are plain text."""

    key: str
    prompt: str
    answer: str


Draw = Callable[[Random], Item]
