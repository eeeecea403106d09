"""The closed world: lands, places and people, and who is what to whom. Everything follows from one seed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random

from rankloom.microworld.names import PERSON, PLACE, inventory

WORLD_SEED = 7
JOBS = (
    "baker", "smith", "farmer", "weaver", "potter", "miller", "hunter", "fisher", "painter", "singer", "builder",
    "teacher", "sailor", "tailor", "cook", "guard", "clerk", "healer", "scribe", "miner",
)  # fmt: skip
PETS = ("dog", "cat", "horse", "goat", "crow", "hen", "turtle", "rabbit", "mouse", "duck")
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "grey")
WARES = (
    "salt", "wool", "glass", "honey", "iron", "silk", "paper", "wine", "oil", "cheese", "rope", "tea", "soap",
    "ink", "copper", "amber",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A town: the land it lies in, what it is known for, and the town its road leads to."""

    name: str
    land: str
    ware: str
    road: str


@dataclass(frozen=True)
class Person:
    """Somebody; no two people share both job and home, and the friends form one ring through everybody."""

    name: str
    home: str
    job: str
    pet: str
    colour: str
    friend: str


@dataclass(frozen=True)
class World:
    """All that is true: 6 lands, 16 places, 80 people for the shipped seed."""

    lands: tuple[str, ...]
    places: tuple[Place, ...]
    people: tuple[Person, ...]

    @property
    def names(self) -> frozenset[str]:
        """Every proper name in use, so that fresh names can avoid them."""
        towns, residents = (p.name for p in self.places), (p.name for p in self.people)
        return frozenset((*self.lands, *towns, *residents))


@cache
def world(seed: int = WORLD_SEED) -> World:
    """The world of `seed`; the embedded base model was trained on the default one."""
    rng = Random(f"world/{seed}")
    lands = tuple(w.capitalize() for w in inventory(rng, PLACE, 6))
    places = _places(rng, lands)
    return World(lands, places, _people(rng, places))


def _places(rng: Random, lands: tuple[str, ...]) -> tuple[Place, ...]:
    names = [w.capitalize() for w in inventory(rng, PLACE, len(WARES), {x.lower() for x in lands})]
    roads = names[1:] + names[:1]
    return tuple(
        Place(name, lands[i % len(lands)], ware, road)
        for i, (name, ware, road) in enumerate(zip(names, rng.sample(WARES, len(WARES)), roads))
    )


def _people(rng: Random, places: tuple[Place, ...]) -> tuple[Person, ...]:
    taken = {p.name.lower() for p in places}
    names = [w.capitalize() for w in inventory(rng, PERSON, 80, taken)]
    posts = rng.sample(list(product(JOBS, (p.name for p in places))), len(names))
    ring = rng.sample(names, len(names))
    friends = dict(zip(ring, ring[1:] + ring[:1]))
    return tuple(
        Person(name, home, job, rng.choice(PETS), rng.choice(COLOURS), friends[name])
        for name, (job, home) in zip(names, posts)
    )
