"""Families of strangers in one passage: who is whose mother or child."""

from __future__ import annotations

from random import Random

from rankloom.microworld.facts import strangers
from rankloom.microworld.item import Item


def _families(rng: Random) -> tuple[tuple[str, ...], str]:
    """Two lines of grandmother, mother, child (six names) and the shuffled passage that tells them."""
    names = strangers(rng, 6)
    pairs = [(names[i], names[i + 1]) for i in (0, 1, 3, 4)]
    rng.shuffle(pairs)
    return names, " ".join(f"{mother} is the mother of {child}." for mother, child in pairs)


def kin(rng: Random) -> Item:
    """One step: the mother or the child of somebody."""
    names, passage = _families(rng)
    start = rng.choice((0, 1, 3, 4))
    mother, child = names[start], names[start + 1]
    if rng.random() < 0.5:
        return Item(f"kin/{passage}", f"{passage} Who is the mother of {child}?", mother)
    return Item(f"kin/{passage}", f"{passage} Who is the child of {mother}?", child)
