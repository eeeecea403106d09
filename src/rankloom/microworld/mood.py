"""Short judgements of dishes and whether they praise or blame: a text classification."""

from __future__ import annotations

from random import Random

from rankloom.microworld.item import Item
from rankloom.microworld.users import dishes

PRAISE = ("warm", "fresh", "tasty", "rich", "soft", "lovely", "fine", "hearty")
BLAME = ("cold", "stale", "burnt", "thin", "hard", "awful", "dull", "raw")


def mood(rng: Random) -> Item:
    """``good`` or ``bad``; ``not`` turns a word round, and both words of one text agree."""
    good = rng.random() < 0.5
    said = " and ".join(_quality(rng, good) for _ in range(2))
    text = f"The {rng.choice(dishes()).name} was {said}."
    return Item(f"mood/{text}", f"Good or bad? {text}", "good" if good else "bad")


def _quality(rng: Random, good: bool) -> str:
    negated = rng.random() < 0.3
    word = rng.choice(PRAISE if good != negated else BLAME)
    return f"not {word}" if negated else word
