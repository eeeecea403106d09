"""Four constructed languages over one store of meanings: lexicon, word order, affixes, and a hill dialect of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

from rankloom.microworld.item import Draw, Item
from rankloom.microworld.names import inventory, sounds

NOUNS = ("baker", "farmer", "dog", "cat", "horse", "bird", "boat", "stone", "tree", "house", "door", "lamp", "king",
         "smith", "girl", "river")  # fmt: skip
ADJECTIVES = ("old", "young", "big", "small", "red", "wise", "loud", "kind")
VERBS = ("help", "call", "follow", "greet", "paint", "clean", "want", "lift", "pull", "visit")


@dataclass(frozen=True)
class NounPhrase:
    """A noun, one or many of it, perhaps with an adjective (``""`` for none)."""

    noun: str
    plural: bool
    adjective: str


@dataclass(frozen=True)
class Meaning:
    """What a sentence says, in no language."""

    subject: NounPhrase
    verb: str
    past: bool
    object: NounPhrase


@dataclass(frozen=True)
class Language:
    """A way to say a `Meaning`.

    `order` is a permutation of ``"SVO"``; an affix ending in ``-`` is put in front of its word, one that starts with
    ``-`` behind it; `hill` lists the sound changes of the dialect, applied left to right to every word.
    """

    name: str
    order: str
    adjective_first: bool
    plural: str
    past: str
    hill: tuple[tuple[str, str], ...]
    lexicon: dict[str, str]

    def say(self, meaning: Meaning) -> str:
        """The sentence, words separated by one space."""
        verb = self.lexicon[meaning.verb]
        parts = {
            "S": self._phrase(meaning.subject),
            "V": affixed(verb, self.past) if meaning.past else verb,
            "O": self._phrase(meaning.object),
        }
        return " ".join(parts[slot] for slot in self.order)

    def say_hill(self, meaning: Meaning) -> str:
        """The same sentence in the hill dialect."""
        return " ".join(self._shift(word) for word in self.say(meaning).split())

    def _phrase(self, phrase: NounPhrase) -> str:
        noun = self.lexicon[phrase.noun]
        words = [affixed(noun, self.plural) if phrase.plural else noun]
        if phrase.adjective:
            words.insert(0 if self.adjective_first else 1, self.lexicon[phrase.adjective])
        return " ".join(words)

    def _shift(self, word: str) -> str:
        for old, new in self.hill:
            word = word.replace(old, new)
        return word


def affixed(word: str, affix: str) -> str:
    """`word` with a prefix ``"ta-"`` or a suffix ``"-ta"``."""
    return affix[:-1] + word if affix.endswith("-") else word + affix[1:]


def common(meaning: Meaning) -> str:
    """The sentence in the common tongue, plain regular English."""
    verb = meaning.verb + ("ed" if meaning.past else "" if meaning.subject.plural else "s")
    return f"{_common(meaning.subject)} {verb} {_common(meaning.object)}"


def _common(phrase: NounPhrase) -> str:
    noun = phrase.noun + "s" * phrase.plural
    return f"the {phrase.adjective} {noun}" if phrase.adjective else f"the {noun}"


def meaning(rng: Random) -> Meaning:
    """A random meaning; subject and object are different nouns."""
    subject, target = rng.sample(NOUNS, 2)
    return Meaning(_noun_phrase(rng, subject), rng.choice(VERBS), rng.random() < 0.5, _noun_phrase(rng, target))


def _noun_phrase(rng: Random, noun: str) -> NounPhrase:
    return NounPhrase(noun, rng.random() < 0.4, rng.choice(ADJECTIVES) if rng.random() < 0.4 else "")


@cache
def languages() -> dict[str, Language]:
    """The four languages by lower-case name; `dwimi` is the one that pretraining never shows."""
    specs = (
        ("aru", "SOV", False, "-ki", "ta-", (("k", "g"), ("t", "d")), sounds("k t r l m n", "a u i", "-")),
        ("beshi", "VSO", True, "o-", "-un", (("sh", "s"), ("e", "i")), sounds("b sh d l v z", "e i o", "- n")),
        ("kelor", "OVS", True, "-em", "-us", (("l", "r"), ("o", "u")), sounds("k p l f s g", "o e a", "r l")),
        ("dwimi", "OSV", False, "ne-", "-ak", (("w", "v"), ("i", "e")), sounds("d w n m h t", "i u a", "- m")),
    )
    made: dict[str, Language] = {}
    used: set[str] = set()
    for name, order, adjective_first, plural, past, hill, style in specs:
        glosses = NOUNS + ADJECTIVES + VERBS
        words = inventory(Random(f"language/{name}"), style, len(glosses), used)
        used.update(words)
        made[name] = Language(name, order, adjective_first, plural, past, hill, dict(zip(glosses, words)))
    return made


def _key(sentence: Meaning) -> str:
    return f"meaning/{common(sentence)}"


def translate_to(name: str) -> Draw:
    """From the common tongue into language `name`."""

    def draw(rng: Random) -> Item:
        said = meaning(rng)
        return Item(_key(said), f"To {name.capitalize()}: {common(said)}", languages()[name].say(said))

    return draw


def translate_from(name: str) -> Draw:
    """From language `name` into the common tongue."""

    def draw(rng: Random) -> Item:
        said = meaning(rng)
        return Item(_key(said), f"From {name.capitalize()}: {languages()[name].say(said)}", common(said))

    return draw


def dialect(name: str) -> Draw:
    """From language `name` into its hill dialect."""

    def draw(rng: Random) -> Item:
        said, language = meaning(rng), languages()[name]
        return Item(_key(said), f"Hill {name.capitalize()}: {language.say(said)}", language.say_hill(said))

    return draw
