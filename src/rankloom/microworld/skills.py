"""Arithmetic, spelling and lists: answers that are computed, not remembered."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from random import Random

from rankloom.microworld.facts import strangers
from rankloom.microworld.item import Draw, Item

_THINGS = ("lamp", "stone", "boat", "door", "tree", "bell", "coin", "drum", "flag", "gate", "key", "mask")


def add(rng: Random) -> Item:
    """Sum of two numbers below 100; the order of the two does not change the split."""
    a, b = rng.randrange(100), rng.randrange(100)
    return Item(f"sum/{min(a, b)}/{max(a, b)}", f"{a} + {b} =", str(a + b))


def subtract(rng: Random) -> Item:
    """Difference of two numbers below 100, never negative."""
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    return Item(f"difference/{a}/{b}", f"{a} - {b} =", str(a - b))


def compare(rng: Random) -> Item:
    """The larger of two different numbers below 1000."""
    a, b = rng.sample(range(1000), 2)
    return Item(f"compare/{min(a, b)}/{max(a, b)}", f"Which is larger, {a} or {b}?", str(max(a, b)))


def spell(rng: Random) -> Item:
    """A word letter by letter."""
    word = strangers(rng, 1)[0].lower()
    return Item(f"spell/{word}", f"Spell: {word}", " ".join(word))


def _items(rng: Random) -> list[str]:
    pool: Sequence[str] = rng.choice((string.ascii_lowercase, string.ascii_lowercase, string.digits, _THINGS))
    return rng.sample(pool, rng.randint(4, 6))


def _on_list(word: str, answer: Callable[[list[str]], Sequence[str]]) -> Draw:
    def draw(rng: Random) -> Item:
        items = _items(rng)
        return Item(f"list/{' '.join(items)}", f"{word}: {' '.join(items)}", " ".join(answer(items)))

    return draw


LISTS: dict[str, Draw] = {
    "list_copy": _on_list("Copy", lambda x: x),
    "list_reverse": _on_list("Reverse", lambda x: x[::-1]),
    "list_sort": _on_list("Sort", sorted),
    "list_first": _on_list("First", lambda x: x[:1]),
    "list_last": _on_list("Last", lambda x: x[-1:]),
    "list_length": _on_list("Count", lambda x: str(len(x))),
    "list_rest": _on_list("Drop", lambda x: x[1:]),
    "list_twice": _on_list("Twice", lambda x: [y for item in x for y in (item, item)]),
}
HELD_OUT_LISTS: dict[str, Draw] = {
    "list_rotate": _on_list("Rotate", lambda x: [*x[1:], x[0]]),
    "list_swap": _on_list("Exchange", lambda x: [x[-1], *x[1:-1], x[0]]),
}
