"""Facts as statements and as questions: closed-book ones about the world, open-book ones about strangers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from random import Random

from rankloom.microworld.item import Item
from rankloom.microworld.names import PERSON, inventory
from rankloom.microworld.world import COLOURS, JOBS, PETS, Person, Place, world


@dataclass(frozen=True)
class Relation:
    """How one field of a `Person` or `Place` is said and asked; ``{0}`` is the subject and ``{1}`` the value."""

    field: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]


PERSON_RELATIONS = (
    Relation(
        "home",
        ("Where does {0} live?", "Where is the home of {0}?"),
        ("{0} lives in {1}.", "The home of {0} is in {1}."),
    ),
    Relation(
        "job",
        ("What is the job of {0}?", "What does {0} work as?"),
        ("{0} is a {1}.", "{0} works as a {1}.", "The job of {0} is {1}."),
    ),
    Relation(
        "pet",
        ("What pet does {0} have?", "Which animal does {0} keep?"),
        ("{0} has a {1}.", "{0} keeps a {1}."),
    ),
    Relation(
        "colour",
        ("What colour does {0} like?", "What is the colour of {0}?"),
        ("{0} likes {1}.", "The colour of {0} is {1}."),
    ),
    Relation(
        "friend",
        ("Who is the friend of {0}?", "Whom does {0} trust?"),
        ("{0} trusts {1}.", "The friend of {0} is {1}."),
    ),
)
PLACE_RELATIONS = (
    Relation("land", ("Which land is {0} in?", "Where is {0}?"), ("{0} is in the land of {1}.", "{0} lies in {1}.")),
    Relation("ware", ("What is {0} known for?", "What does {0} sell?"), ("{0} is known for {1}.", "{0} sells {1}.")),
    Relation(
        "road",
        ("Where does the road from {0} lead?", "Which town is next to {0}?"),
        ("The road from {0} leads to {1}.", "Next to {0} is {1}."),
    ),
)
_OPEN_BOOK = {"job": JOBS, "pet": PETS, "colour": COLOURS}


def value(subject: Person | Place, relation: Relation) -> str:
    """What `relation` says of `subject`."""
    return str(getattr(subject, relation.field))


def statement(rng: Random, subject: Person | Place, relation: Relation) -> str:
    """One sentence, in one of the relation's wordings."""
    return rng.choice(relation.statements).format(subject.name, value(subject, relation))


def _closed_book(rng: Random, subject: Person | Place, relation: Relation) -> Item:
    question = rng.choice(relation.questions).format(subject.name)
    return Item(f"fact/{subject.name}/{relation.field}", question, value(subject, relation))


def people(rng: Random) -> Item:
    """A question about a person of the world; the answer was stated in documents only."""
    return _closed_book(rng, rng.choice(world().people), rng.choice(PERSON_RELATIONS))


def places(rng: Random) -> Item:
    """A question about a place of the world."""
    return _closed_book(rng, rng.choice(world().places), rng.choice(PLACE_RELATIONS))


def who(rng: Random) -> Item:
    """The inverse question: who holds a job in a town."""
    person = rng.choice(world().people)
    return Item(f"who/{person.name}", f"Who is the {person.job} of {person.home}?", person.name)


def check(rng: Random) -> Item:
    """Is a statement about the world true? Half of them are."""
    person = rng.choice(world().people)
    relation = rng.choice(PERSON_RELATIONS)
    true = value(person, relation)
    said = true if rng.random() < 0.5 else value(rng.choice(world().people), relation)
    claim = relation.statements[0].format(person.name, said)
    return Item(f"check/{claim}", f"True or false: {claim}", "true" if said == true else "false")


def describe(rng: Random) -> Item:
    """Tell about a person: home and job in two sentences."""
    person = rng.choice(world().people)
    prompt = rng.choice(("Tell me about {0}.", "Who is {0}?")).format(person.name)
    return Item(
        f"describe/{person.name}", prompt, f"{person.name} lives in {person.home}. {person.name} is a {person.job}."
    )


def strangers(rng: Random, count: int) -> tuple[str, ...]:
    """`count` names of people who are not in the world."""
    taken = {name.lower() for name in world().names}
    return tuple(w.capitalize() for w in inventory(rng, PERSON, count, taken))


def reading(rng: Random) -> Item:
    """A passage about two strangers, and a question that only the passage answers."""
    fields = rng.sample(sorted(_OPEN_BOOK), 2)
    asked = [r for r in PERSON_RELATIONS if r.field in fields]
    told = product(strangers(rng, 2), asked)
    said = {(name, relation): rng.choice(_OPEN_BOOK[relation.field]) for name, relation in told}
    lines = [relation.statements[0].format(name, answer) for (name, relation), answer in said.items()]
    rng.shuffle(lines)
    (name, relation), answer = rng.choice(list(said.items()))
    prompt = f"{' '.join(lines)} {relation.questions[0].format(name)}"
    return Item(f"reading/{prompt}", prompt, answer)
