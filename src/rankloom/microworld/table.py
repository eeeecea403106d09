"""The table of tasks and the two ways to draw from it: lists of distinct examples, and an endless stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from random import Random
from typing import Any, TypeVar

from rankloom.errors import DataError, SettingsError, suggest
from rankloom.microworld import code, facts, kin, language, mood, skills, texts, users
from rankloom.microworld.item import Draw, Item
from rankloom.microworld.splits import Split, check_split, split_of

T = TypeVar("T")

SEEN: dict[str, Draw] = {
    "people": facts.people,
    "places": facts.places,
    "who": facts.who,
    "check": facts.check,
    "describe": facts.describe,
    "reading": facts.reading,
    "kin": kin.kin,
    "mood": mood.mood,
    "add": skills.add,
    "subtract": skills.subtract,
    "compare": skills.compare,
    "spell": skills.spell,
    **skills.LISTS,
    "to_aru": language.translate_to("aru"),
    "to_beshi": language.translate_to("beshi"),
    "to_kelor": language.translate_to("kelor"),
    "from_aru": language.translate_from("aru"),
    "from_beshi": language.translate_from("beshi"),
    "from_kelor": language.translate_from("kelor"),
    "hill_aru": language.dialect("aru"),
    "hill_beshi": language.dialect("beshi"),
    "program_run": code.program_run,
    "program_summary": code.program_summary,
    "program_write": code.program_write,
    "program_review": code.program_review,
    "rate": users.rate,
    "prefer": users.prefer,
    "tastes": users.tastes,
}
HELD_OUT: dict[str, Draw] = {
    **skills.HELD_OUT_LISTS,
    "to_dwimi": language.translate_to("dwimi"),
    "from_dwimi": language.translate_from("dwimi"),
    "hill_kelor": language.dialect("kelor"),
    "program_fix": code.program_fix,
    "user_voice": users.user_voice,
}
_DRAWS = SEEN | HELD_OUT
_PATIENCE = 2000


def tasks() -> tuple[str, ...]:
    """Every task, seen ones first."""
    return tuple(_DRAWS)


def held_out() -> tuple[str, ...]:
    """The tasks that the embedded base model never saw."""
    return tuple(HELD_OUT)


def stream(task: str, split: Split, seed: int = 0) -> Iterator[Item]:
    """Endless examples of `task` from `split`, with repetition; the same for the same three arguments.

    Raises `SettingsError` for an unknown task or split.
    """
    if task not in _DRAWS:
        raise SettingsError(f"there is no task {task!r}{suggest(task, _DRAWS)}; see rankloom.microworld.tasks()")
    return _of_split(_DRAWS[task], lambda item: item.key, check_split(split), Random(f"{task}/{split}/{seed}"))


def examples(task: str, split: Split, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """`n` examples with different prompts, each ``{"messages": [user turn, assistant turn]}``.

    No prompt of one split occurs in another, for any seed. Raises `SettingsError` for an unknown task or split or a
    negative `n`, and `DataError` when the split holds fewer than `n` examples.
    """
    drawn = _distinct(stream(task, split, seed), lambda item: item.prompt, n, f"task {task!r}", split)
    return [
        {"messages": [{"role": "user", "content": x.prompt}, {"role": "assistant", "content": x.answer}]} for x in drawn
    ]


def documents(split: Split, n: int, seed: int = 0) -> list[str]:
    """`n` different plain texts about the world; errors as for `examples`.

    No text of one split occurs in another. Facts do: every fact is told in every split, in other words and order.
    """
    drawn = document_stream(split, seed)
    return _distinct(drawn, lambda text: text, n, "the documents", split)


def document_stream(split: Split, seed: int = 0) -> Iterator[str]:
    """Endless texts of `split`, with repetition."""
    rng = Random(f"documents/{split}/{seed}")
    return _of_split(texts.document, lambda text: f"document/{text}", check_split(split), rng)


def _of_split(draw: Callable[[Random], T], key: Callable[[T], str], split: Split, rng: Random) -> Iterator[T]:
    while True:
        drawn = draw(rng)
        if split_of(key(drawn)) == split:
            yield drawn


def _distinct(drawn: Iterator[T], identity: Callable[[T], str], n: int, what: str, split: Split) -> list[T]:
    if n < 0:
        raise SettingsError(f"n must be 0 or more, got {n}")
    found: dict[str, T] = {}
    stale = 0
    while len(found) < n:
        fresh = next(drawn)
        stale = stale + 1 if identity(fresh) in found else 0
        found.setdefault(identity(fresh), fresh)
        if stale > _PATIENCE:
            raise DataError(f"{what} has only {len(found)} different examples in {split!r}; ask for n={len(found)}")
    return list(islice(found.values(), n))
