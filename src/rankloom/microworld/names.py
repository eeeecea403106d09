"""Invented words: syllables put together by a seeded generator, so that no name comes from outside."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Style:
    """The sounds of a group of words; `lengths` are the syllable counts to choose from, `codas` may hold ``""``."""

    onsets: tuple[str, ...]
    vowels: tuple[str, ...]
    codas: tuple[str, ...]
    lengths: tuple[int, ...] = (2,)


def sounds(onsets: str, vowels: str, codas: str, lengths: tuple[int, ...] = (2,)) -> Style:
    """A `Style` from lists separated by spaces; the coda ``-`` is no coda."""
    closing = tuple("" if c == "-" else c for c in codas.split())
    return Style(tuple(onsets.split()), tuple(vowels.split()), closing, lengths)


PERSON = sounds("b d f k l m n r s t v z th br", "a e i o u", "- - n l r s k")
PLACE = sounds("b d f g h k l m n p r t v w dr st", "a e i o u", "m n r l nd rk th sk")
DISH = sounds("p t k b m n l v s ch j", "a e i o u", "-", (3,))


def invent(rng: Random, style: Style) -> str:
    """One lower-case word; only its last syllable is closed by a coda."""
    syllables = [rng.choice(style.onsets) + rng.choice(style.vowels) for _ in range(rng.choice(style.lengths))]
    return "".join(syllables) + rng.choice(style.codas)


def inventory(rng: Random, style: Style, count: int, taken: Collection[str] = ()) -> tuple[str, ...]:
    """`count` different words, none of them in `taken`, in the order drawn."""
    words: dict[str, None] = {}
    while len(words) < count:
        word = invent(rng, style)
        if word not in taken:
            words[word] = None
    return tuple(words)
