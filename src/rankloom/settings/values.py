"""What each kind of hint takes of a value that came from a person or a file, and what is said if it does not."""

from __future__ import annotations

import functools
import math
import numbers
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from rankloom.errors import SettingsError

LARGEST = 1 << 63
"""Whole numbers are below it in size."""
NO_TEXT = re.compile("[\0\ud800-\udfff]")
PLURAL = {"text": "texts", "a whole number": "whole numbers", "a number": "numbers", "true or false": "truth values"}


class Reader(NamedTuple):
    """How one hint is read: in words what it takes; (value, where) → the value as it is kept; the texts that it knows.

    `read` raises `SettingsError`.
    """

    words: str
    read: Callable[[Any, str], Any]
    known: tuple[str, ...] = ()


def refusal(where: str, value: Any, words: str, advice: str = "") -> SettingsError:
    """The error for a value that is not what `words` says."""
    return SettingsError(f"{where}={shown(value)}: expected {words}{advice}", where, advised=bool(advice))


def join(where: str, key: str) -> str:
    """The path of a setting below `where`."""
    return f"{where}.{key}" if where and key else where or key


def shown(value: Any) -> str:
    """A value as an error shows it: never long, whatever it is."""
    try:
        text = repr(list(value) if isinstance(value, tuple) else value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:120]}…"


def meant(value: Any) -> Iterator[Any]:
    """What a value of the wrong type may have been meant as."""
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    if isinstance(value, str):
        yield from ({"true": True, "false": False}[word] for word in (value.lower(),) if word in ("true", "false"))
        for kind in (int, float):
            try:
                yield kind(value)
            except ValueError:
                continue
    if isinstance(value, (int, float)) and abs(value) < 1 << 53:
        yield str(value)
    if not isinstance(value, (list, tuple)):
        yield [value]


def scalar(words: str, take: Callable[[Any], Any]) -> Reader:
    """Keeps what `take` makes of a value, and refuses where that is None."""

    def read(value: Any, where: str) -> Any:
        taken = take(value)
        if taken is None:
            raise refusal(where, value, words)
        return taken

    return Reader(words, read)


def literal(*values: Any) -> Reader:
    """One of `values`, of the same type."""
    words = ("one of " if len(values) > 1 else "") + ", ".join(map(shown, values))

    def read(value: Any, where: str) -> Any:
        for known in values:
            if type(value) is type(known) and value == known:
                return known
        raise refusal(where, value, words)

    return Reader(words, read, tuple(v for v in values if isinstance(v, str)))


def union(*options: Reader) -> Reader:
    """What one of the options takes: the one that leaves the value's type as it is, else the first."""
    words = " or ".join(dict.fromkeys(option.words for option in options))

    def read(value: Any, where: str) -> Any:
        taken, deeper = [], None
        for option in options:
            try:
                taken.append(option.read(value, where))
            except SettingsError as error:
                deeper = error if error.advised or error.path != where else deeper
        if not taken:
            raise deeper or refusal(where, value, words)
        return next((each for each in taken if type(each) is type(value)), taken[0])

    return Reader(words, read, tuple(known for option in options for known in option.known))


def bounded(inner: Reader, *notes: Any) -> Reader:
    """What `inner` takes and every note (`Within`, `Where`) agrees to."""
    words = functools.reduce(lambda said, note: note.words(said), notes, inner.words)

    def read(value: Any, where: str) -> Any:
        try:
            taken = inner.read(value, where)
        except SettingsError as error:
            raise error if error.path != where else refusal(where, value, words) from None
        if not all(note(taken) for note in notes):
            raise refusal(where, value, words)
        return taken

    return Reader(words, read, inner.known)


def sequence(*items: Reader, repeated: bool, lone: type | None = None) -> Reader:
    """A list with one value for each reader, or, `repeated`, of any length for the one reader.

    A set is sorted. `lone`: int or str, of which a single one is a list of one, as in PEFT's configs.
    """
    words = [item.words for item in items]
    said = (
        f"a list of {PLURAL.get(words[0], f'({words[0]})')}"
        if repeated
        else f"a list of {len(items)}: {', '.join(words)}"
    )

    def read(value: Any, where: str) -> Any:
        if isinstance(value, (set, frozenset)):
            value = sorted(value, key=repr)
        if lone is not None and LONE[lone](value) is not None:
            value = [value]
        if not isinstance(value, (list, tuple)) or not (repeated or len(value) == len(items)):
            raise refusal(where, value, said)
        readers = items * len(value) if repeated else items
        return tuple(item.read(each, f"{where}[{i}]") for i, (item, each) in enumerate(zip(readers, value)))

    return Reader(said, read)


def mapping(key: Reader, item: Reader) -> Reader:
    """A mapping of any size."""
    words = f"a mapping from {PLURAL.get(key.words, key.words)} to {PLURAL.get(item.words, item.words)}"

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, Mapping):
            raise refusal(where, value, words)
        return {key.read(k, f"a key of {where}"): item.read(v, join(where, str(k))) for k, v in value.items()}

    return Reader(words, read)


def instance(cls: Any) -> Reader:
    """An object of a class that is no setting; anything where `cls` is no class."""
    words = f"a {getattr(cls, '__name__', cls)}"

    def read(value: Any, where: str) -> Any:
        if isinstance(cls, type) and not isinstance(value, cls):
            raise refusal(where, value, words)
        return value

    return Reader(words, read)


def whole(value: Any) -> int | None:
    """A whole number that 64 bits hold; no truth value and no float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    found = int(value)
    return found if -LARGEST <= found < LARGEST else None


def number(value: Any) -> float | None:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def text(value: Any) -> str | None:
    """Text that UTF-8 can hold, without NUL."""
    return str.__str__(value) if isinstance(value, str) and not NO_TEXT.search(value) else None


LONE: Mapping[type, Callable[[Any], Any]] = {int: whole, str: text}
ANYTHING = Reader("anything", lambda value, where: value)
NOTHING = literal(None)._replace(words="null")
SCALARS: Mapping[Any, Reader] = {
    bool: scalar("true or false", lambda value: value if isinstance(value, bool) else None),
    int: scalar("a whole number", whole),
    float: scalar("a number", number),
    str: scalar("text", text),
    type(None): NOTHING,
    None: NOTHING,
    Any: ANYTHING,
}
