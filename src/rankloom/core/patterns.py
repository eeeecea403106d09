"""Regular expressions on names, in time that grows with expression and name alone, wherever they come from.

`re` tries one way after the other, and an expression of ten letters can have 2^26 of them. So the ways are counted
first, and where there may be many the expression is evaluated on *sets of places* in the name: each part maps the
places where it may begin to those where it may end, all at once. A set is the bits of one integer.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

from rankloom.errors import SettingsError

_parser: Any = importlib.import_module("re._parser")
_compiler: Any = importlib.import_module("re._compiler")
_c: Any = importlib.import_module("re._constants")

NAME = 256
"""Letters of a long name, for what an expression may cost."""
WORK = 100_000
"""Most steps that `re` may take for one name."""
DEEPEST = 50
"""Groups within groups."""
TWICE, EFFORT = 2, 64
"""Evaluations on sets that a match may take, for each part of the expression and for each letter of the name."""
SEARCH = 5_000
"""Most steps of an expression that is searched for, from every place of a name."""
MANY = 1 << 40


class _Unbounded(Exception):
    """An item of an expression that cannot be evaluated on sets of places."""


Step = Callable[["_Name", int, bool], int]
"""(name, places, forward) → the places behind what matches there; before it, if not forward."""


def fullmatches(expression: str, name: str) -> bool:
    """Whether `re.fullmatch` finds it. Raises `re.error` for no expression, `SettingsError` for one that would take
    long even so.
    """
    return _matcher(expression)(name)


def check(expression: str) -> None:
    """Raises what `fullmatches` raises, whatever the name."""
    _matcher(expression)


def cheap(expression: str) -> bool:
    """Whether there are so few ways to match it that `re` does it."""
    return _work(_parsed(expression))[0] <= WORK


@functools.lru_cache(maxsize=4096)
def check_searched(expression: str) -> None:
    """Refuse, as `check` does, an expression that `re` itself is to search for and that has many ways to match."""
    if _work(_parsed(expression))[0] > SEARCH:
        raise SettingsError(f"the regular expression {_short(expression)} has too many ways to match: write a name")


@functools.lru_cache(maxsize=4096)
def _matcher(expression: str) -> Callable[[str], bool]:
    tree = _parsed(expression)
    if _work(tree)[0] <= WORK:
        compiled = re.compile(expression)
        return lambda name: compiled.fullmatch(name) is not None
    try:
        step, parts = _sequence(tree, tree.state.flags), _size(tree)
    except _Unbounded as error:
        raise SettingsError(
            f"the regular expression {_short(expression)} has very many ways to match, and {error}: write it without "
            "them, or name the modules"
        ) from error

    @functools.lru_cache(maxsize=4096)
    def matches(name: str) -> bool:
        read = _Name(name, TWICE * parts + EFFORT * len(name))
        try:
            return bool(step(read, 1, True) >> len(name))
        except TimeoutError:
            raise SettingsError(
                f"the regular expression {_short(expression)} takes too long on {name!r}: write it without repeats "
                "in repeats, or name the modules"
            ) from None

    return matches


def _parsed(expression: str) -> Any:
    """The tree of an expression. Raises `re.error`, also for one that is too deep or counts too far."""
    try:
        tree = _parser.parse(expression)
    except (RecursionError, OverflowError) as error:
        raise re.error(str(error) or "nested too deeply") from error
    if _depth(tree) > DEEPEST:
        raise re.error(f"groups more than {DEEPEST} deep")
    if tree.state.flags & (re.MULTILINE | re.LOCALE):
        raise re.error("the flags m and L say nothing about names")
    return tree


def _short(expression: str) -> str:
    return repr(expression if len(expression) <= 80 else f"{expression[:80]}…")


def _inner(op: Any, argument: Any) -> list[Any]:
    """The trees within one item of a tree."""
    if op is _c.BRANCH:
        return list(argument[1])
    if op in (_c.SUBPATTERN, _c.MAX_REPEAT, _c.MIN_REPEAT, _c.POSSESSIVE_REPEAT, _c.ASSERT, _c.ASSERT_NOT):
        return [argument[-1]]
    if op is _c.ATOMIC_GROUP:
        return [argument]
    if op is _c.GROUPREF_EXISTS:
        return [tree for tree in argument[1:] if tree is not None]
    return []


def _depth(tree: Any) -> int:
    deepest, waiting = 0, [(tree, 0)]
    while waiting:
        found, depth = waiting.pop()
        deepest = max(deepest, depth)
        if depth <= DEEPEST:
            waiting += [(inner, depth + 1) for op, argument in found for inner in _inner(op, argument)]
    return deepest


def _size(tree: Any) -> int:
    """How many items there are at all levels."""
    return sum(1 + sum(map(_size, _inner(op, argument))) for op, argument in tree)


def _work(tree: Any) -> tuple[int, int]:
    """(steps that backtracking may take from one place of a name, ways to match there), or `MANY` of them."""
    steps, ways = 0, 1
    for op, argument in tree:
        more, branches = _work_of(op, argument)
        steps, ways = min(MANY, steps + ways * more), min(MANY, ways * branches)
    return max(1, steps), ways


def _work_of(op: Any, argument: Any) -> tuple[int, int]:
    inner = [_work(tree) for tree in _inner(op, argument)]
    if op in (_c.MAX_REPEAT, _c.MIN_REPEAT, _c.POSSESSIVE_REPEAT):
        return _work_of_repeat(argument, *inner[0])
    if not inner:
        return 1, 1
    return min(MANY, 1 + sum(steps for steps, _ in inner)), min(MANY, max(1, sum(ways for _, ways in inner)))


def _work_of_repeat(argument: Any, steps: int, ways: int) -> tuple[int, int]:
    """Of an item that is repeated: every number of rounds is a way, and each round multiplies them."""
    low, high, tree = argument
    narrowest = tree.getwidth()[0]
    if high > NAME and not narrowest:
        return MANY, MANY
    rounds = min(high, NAME // max(1, narrowest))
    if ways == 1:
        return min(MANY, (rounds + 1) * steps), max(1, rounds + 1 - low)
    if rounds > 40:
        return MANY, MANY
    each = [min(MANY, ways**n) for n in range(rounds + 1)]
    return min(MANY, steps * sum(each)), min(MANY, max(1, sum(each[low:])))


class _Name:
    """A name that is matched: the bits of all its places, and how many evaluations are left."""

    def __init__(self, text: str, left: int) -> None:
        self.text, self.left = text, left
        self.size = len(text)
        self.all = (1 << (self.size + 1)) - 1
        self.letters: dict[str, int] = {}
        for at, letter in enumerate(text):
            self.letters[letter] = self.letters.get(letter, 0) | 1 << at

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise TimeoutError


def _sequence(tree: Iterable[Any], flags: int) -> Step:
    steps = [_item(op, argument, flags) for op, argument in tree]
    back = steps[::-1]

    def step(name: _Name, places: int, forward: bool) -> int:
        for each in steps if forward else back:
            if not places:
                return 0
            places = each(name, places, forward)
        return places

    return steps[0] if len(steps) == 1 else step


def _item(op: Any, argument: Any, flags: int) -> Step:
    if op in (_c.LITERAL, _c.NOT_LITERAL, _c.ANY, _c.IN):
        return _letter(op, argument, flags)
    if op is _c.AT:
        return _at(op, argument, flags)
    if op is _c.SUBPATTERN:
        _, added, removed, tree = argument
        return _sequence(tree, (flags | added) & ~removed)
    if op is _c.BRANCH:
        return _branch([_sequence(tree, flags) for tree in argument[1]])
    if op in (_c.ASSERT, _c.ASSERT_NOT):
        return _look(argument[0] < 0, _sequence(argument[1], flags), op is _c.ASSERT)
    if op in (_c.MAX_REPEAT, _c.MIN_REPEAT):
        return _repeat(*_flat(*argument), flags)
    if op is _c.FAILURE:
        return lambda name, places, forward: 0
    raise _Unbounded("refers to groups or keeps what they took (\\1, (?>…), a++)")


def _letter(op: Any, argument: Any, flags: int) -> Step:
    holds = _letters(op, argument, flags)

    def step(name: _Name, places: int, forward: bool) -> int:
        name.spend()
        mask = holds(name)
        return (places & mask) << 1 if forward else (places >> 1) & mask

    return step


def _letters(op: Any, argument: Any, flags: int) -> Callable[[_Name], int]:
    """Where in a name a letter is one of these, as bits."""
    if op is _c.LITERAL and not flags & re.IGNORECASE:
        letter = chr(argument)
        return lambda name: name.letters.get(letter, 0)
    one = _alone(op, argument, flags)
    known: dict[str, bool] = {}

    def holds(name: _Name) -> int:
        mask = 0
        for letter, bits in name.letters.items():
            if letter not in known:
                known[letter] = one.match(letter) is not None
            mask |= bits if known[letter] else 0
        return mask

    return holds


def _at(op: Any, argument: Any, flags: int) -> Step:
    one = _alone(op, argument, flags)

    def step(name: _Name, places: int, forward: bool) -> int:
        name.spend()
        return places & sum(1 << at for at in range(name.size + 1) if one.match(name.text, at))

    return step


def _alone(op: Any, argument: Any, flags: int) -> Any:
    """One item that takes a letter at most, as `re` compiles it."""
    state = _parser.State()
    state.flags, state.str = flags, ""
    return _compiler.compile(_parser.SubPattern(state, [(op, argument)]), flags)


def _branch(steps: list[Step]) -> Step:
    def step(name: _Name, places: int, forward: bool) -> int:
        name.spend()
        found = 0
        for each in steps:
            found |= each(name, places, forward)
        return found

    return step


def _look(behind: bool, inner: Step, wanted: bool) -> Step:
    """Looking ahead is matching backward from everywhere; looking behind, forward."""

    def step(name: _Name, places: int, forward: bool) -> int:
        name.spend()
        found = inner(name, name.all, behind)
        return places & (found if wanted else ~found)

    return step


def _flat(low: int, high: int, tree: Any) -> tuple[int, int, Any]:
    """A repeat of a repeat, both open and from 0 or 1 on, as one: `((a+)+)*` is `a*`."""
    inner = _only(tree)
    if inner is None or high is not _c.MAXREPEAT or low > 1:
        return low, high, tree
    below, most, deeper = _flat(*inner)
    return (low * below, high, deeper) if most is _c.MAXREPEAT and below <= 1 else (low, high, tree)


def _only(tree: Any) -> Any:
    """What is repeated in a tree that is nothing but a repeat, in groups or not; else None."""
    while len(tree) == 1:
        op, argument = tree[0]
        if op in (_c.MAX_REPEAT, _c.MIN_REPEAT):
            return argument
        if op is not _c.SUBPATTERN or argument[1] or argument[2]:
            return None
        tree = argument[3]
    return None


def _repeat(low: int, high: Any, tree: Any, flags: int) -> Step:
    inner = _sequence(tree, flags)
    if high is _c.MAXREPEAT and len(tree) == 1 and tree[0][0] in (_c.LITERAL, _c.NOT_LITERAL, _c.ANY, _c.IN):
        op, argument = tree[0]
        return _after(inner, low, _run(_letters(op, argument, flags)))

    def more(name: _Name, places: int, forward: bool) -> int:
        seen = new = places
        rounds = min(int(high) - low, name.size + 1)
        while new and rounds:
            name.spend()
            new = inner(name, new, forward) & ~seen
            seen |= new
            rounds -= 1
        return seen

    return _after(inner, low, more)


def _after(inner: Step, low: int, more: Step) -> Step:
    """`more` behind `low` rounds. A set that a round leaves as it is stays so, and by then all that moves is gone."""

    def step(name: _Name, places: int, forward: bool) -> int:
        for _ in range(low):
            name.spend()
            found = inner(name, places, forward)
            if found == places or not found:
                places = found
                break
            places = found
        return more(name, places, forward)

    return step


def _run(holds: Callable[[_Name], int]) -> Step:
    """Any number of such letters: the distances that can be gone are doubled in each round."""

    def step(name: _Name, places: int, forward: bool) -> int:
        name.spend()
        can, distance = holds(name), 1
        can = can if forward else can << 1
        while can and distance <= name.size:
            moved = places & can
            places |= moved << distance if forward else moved >> distance
            can &= can >> distance if forward else can << distance
            distance <<= 1
        return places

    return step
