"""Users with tastes: the first people of the world, a menu of dishes, and the ratings that follow from both."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random

from rankloom.microworld.item import Item
from rankloom.microworld.names import DISH, inventory
from rankloom.microworld.world import Person, world

FLAVOURS = ("sweet", "sour", "salty", "bitter", "spicy")
KINDS = ("soup", "cake", "stew", "bread", "salad")
HAILS = ("Hail", "Welcome", "Good day", "Ho there", "Peace", "Well met", "Greetings", "Hello")
WISHES = ("stay warm", "walk well", "eat well", "sleep long", "be brave", "be merry", "keep dry", "sing loud")


@dataclass(frozen=True)
class Dish:
    """Something on the menu."""

    name: str
    kind: str
    flavour: str

    def __str__(self) -> str:
        return f"{self.name}, a {self.flavour} {self.kind}"


@dataclass(frozen=True)
class User:
    """A person with tastes, and with a voice of their own: how they hail others and what they wish them."""

    person: Person
    loves: str
    dislikes: str
    kind: str
    hail: str
    wish: str

    @property
    def name(self) -> str:
        """The person's name."""
        return self.person.name

    def rating(self, dish: Dish) -> int:
        """1 to 5: a middling 3, +1 for the loved flavour, -1 for the disliked one, ±1 for the kind."""
        flavour = (dish.flavour == self.loves) - (dish.flavour == self.dislikes)
        return 3 + flavour + (1 if dish.kind == self.kind else -1)

    def greeting(self, to: str) -> str:
        """The user's greeting to the person named `to`."""
        return f"{self.hail} {to}, {self.wish}!"


@cache
def users() -> tuple[User, ...]:
    """24 users; every one has a hail and a wish, and no two have both the same."""
    rng = Random("users")
    voices = rng.sample(list(product(HAILS, WISHES)), 24)
    made = []
    for person, (hail, wish) in zip(world().people, voices):
        loves, dislikes = rng.sample(FLAVOURS, 2)
        made.append(User(person, loves, dislikes, rng.choice(KINDS), hail, wish))
    return tuple(made)


@cache
def dishes() -> tuple[Dish, ...]:
    """50 dishes, two for every kind and flavour."""
    rng = Random("dishes")
    names = inventory(rng, DISH, 2 * len(FLAVOURS) * len(KINDS), {name.lower() for name in world().names})
    return tuple(Dish(name.capitalize(), *taste) for name, taste in zip(names, list(product(KINDS, FLAVOURS)) * 2))


def rate(rng: Random) -> Item:
    """What a user would give a dish."""
    user, dish = rng.choice(users()), rng.choice(dishes())
    return Item(f"rate/{user.name}/{dish.name}", f"How does {user.name} rate {dish}?", str(user.rating(dish)))


def prefer(rng: Random) -> Item:
    """Which of two dishes a user would rather have; their ratings differ."""
    user = rng.choice(users())
    while True:
        first, second = rng.sample(dishes(), 2)
        if user.rating(first) != user.rating(second):
            break
    names = "/".join(sorted((first.name, second.name)))
    better = max(first, second, key=user.rating)
    return Item(f"prefer/{user.name}/{names}", f"{user.name} may have {first}, or {second}. Which?", better.name)


def tastes(rng: Random) -> Item:
    """What a user loves, dislikes, or cooks."""
    user = rng.choice(users())
    asked, answer = rng.choice(
        (
            (f"What taste does {user.name} love?", user.loves),
            (f"What taste does {user.name} dislike?", user.dislikes),
            (f"What kind of dish does {user.name} want?", user.kind),
        )
    )
    return Item(f"taste/{asked}", asked, answer)


def user_voice(rng: Random) -> Item:
    """A greeting in a user's own voice."""
    user, to = rng.choice(users()), rng.choice(world().people).name
    return Item(f"voice/{user.name}/{to}", f"Greet {to} as {user.name}.", user.greeting(to))
