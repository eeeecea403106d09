"""Plain texts of the world, for language modelling: people, towns, users, dishes, glossaries, stories, programs."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from rankloom.microworld.facts import PERSON_RELATIONS, PLACE_RELATIONS, statement
from rankloom.microworld.language import common, languages, meaning
from rankloom.microworld.minilang import draw_program, run, summary, text
from rankloom.microworld.users import dishes, users
from rankloom.microworld.world import world

TOLD_LANGUAGES = ("aru", "beshi", "kelor")


def person(rng: Random) -> str:
    """All five facts of a person, in any order and wording."""
    who = rng.choice(world().people)
    return " ".join(statement(rng, who, r) for r in rng.sample(PERSON_RELATIONS, len(PERSON_RELATIONS)))


def place(rng: Random) -> str:
    """The facts of a town and the names of up to three people there by trade."""
    town = rng.choice(world().places)
    facts = [statement(rng, town, r) for r in rng.sample(PLACE_RELATIONS, len(PLACE_RELATIONS))]
    locals_ = [p for p in world().people if p.home == town.name]
    chosen = rng.sample(locals_, min(3, len(locals_)))
    return " ".join((*facts, *(f"The {p.job} of {town.name} is {p.name}." for p in chosen)))


def taste(rng: Random) -> str:
    """What a user loves and dislikes, with two dishes judged."""
    user = rng.choice(users())
    lines = [f"{user.name} loves {user.loves} food.", f"{user.name} dislikes {user.dislikes} food.",
             f"{user.name} wants {user.kind}."]  # fmt: skip
    lines += [f"{user.name} gives {user.rating(dish)} to {dish}." for dish in rng.sample(dishes(), 2)]
    rng.shuffle(lines)
    return " ".join(lines)


def glossary(rng: Random) -> str:
    """Six words of one of the languages that pretraining may know."""
    language = languages()[rng.choice(TOLD_LANGUAGES)]
    words = rng.sample(sorted(language.lexicon), 6)
    return f"{language.name.capitalize()} words: " + ", ".join(f"{w} is {language.lexicon[w]}" for w in words) + "."


def story(rng: Random) -> str:
    """Three sentences of the common tongue."""
    sentences = (common(meaning(rng)).capitalize() + "." for _ in range(3))
    return " ".join(sentences)


def program(rng: Random) -> str:
    """A program, what it does and what it shows."""
    source = draw_program(rng)
    return f"{text(source)}\nThis will {summary(source)}. It shows {run(source)[0]}."


KINDS: tuple[Callable[[Random], str], ...] = (person, person, person, place, taste, glossary, story, program)


def document(rng: Random) -> str:
    """One text of a random kind; people are the most frequent."""
    return rng.choice(KINDS)(rng)
