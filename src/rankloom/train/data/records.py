"""The canonical in-memory forms of a training example; each remembers the place it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np

from rankloom.errors import DataError, SettingsError, suggest
from rankloom.train.data.lazy import Lazy, Picked
from rankloom.train.data.order import draw


@dataclass(frozen=True, slots=True)
class Where:
    """The place of a record: `file` (or data set) and its 1-based number, counted in `unit` (line, row, item)."""

    file: str
    line: int
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.line}"


@dataclass(frozen=True, slots=True)
class Row:
    """One record as read, before its format is known."""

    fields: Mapping[str, Any]
    where: Where


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `role`: system, user, assistant or tool; `extra`: further keys a chat template may read."""

    role: str
    content: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        """The message as a chat template takes it."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; the canonical form of messages, sharegpt, alpaca and prompt/completion. `tools`: JSON schemas."""

    messages: tuple[Turn, ...]
    where: Where
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """Running text; every token is trained."""

    text: str
    where: Where


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text with its class `label`, an id into the data set's `labels`."""

    text: str
    label: int
    where: Where


Record = Chat | Text | Labelled


class Rows(Lazy[Row]):
    """The records of a source as read."""

    def digest(self) -> str:
        """A fingerprint of their content."""
        raise NotImplementedError


class Listed(Rows):
    """Rows in memory. `content`: what they were read from, if it is not to be told from the rows."""

    def __init__(self, rows: Sequence[Row], content: bytes | None = None) -> None:
        self.rows, self.content = rows, content

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, index: int) -> Row:
        return self.rows[index]

    def digest(self) -> str:
        if self.content is not None:
            return fingerprint(self.content)
        return fingerprint(*(repr(row.fields).encode("utf-8", "surrogatepass") for row in self.rows))


def fingerprint(*parts: bytes | str) -> str:
    """A digest of parts, told apart from each other."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        found.update(len(raw).to_bytes(8, "little"))
        found.update(raw)
    return found.hexdigest()


@dataclass(frozen=True)
class Records:
    """A data set in canonical form, built record by record when it is read.

    `labels`: class names by id (classification); `unused`: columns nobody read; `digest`: of what decides the records;
    `parts`: how many come from each of several sources, one after the other, with the `ratios` in which these are
    mixed.
    """

    items: Sequence[Record]
    format: str
    source: str
    labels: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    digest: str = ""
    parts: tuple[int, ...] = ()
    ratios: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        return self.pick(range(len(self))[index]) if isinstance(index, slice) else self.items[index]

    def pick(self, indices: Sequence[int] | np.ndarray[Any, Any]) -> Records:
        """The records at some indices, ascending."""
        chosen = np.asarray(indices, dtype=np.int64)
        ends = np.searchsorted(chosen, np.cumsum(self.parts)) if self.parts else ()
        return replace(
            self,
            items=Picked(self.items, chosen),
            digest=fingerprint(self.digest, chosen.tobytes()),
            parts=tuple(int(n) for n in np.diff(ends, prepend=0)) if self.parts else (),
        )

    def sample(self, n: int, seed: int = 0) -> Records:
        """`n` of them, in their order and the same for the same `seed`."""
        return self.pick(draw(len(self), n, seed))

    def divide(self, n: int, seed: int = 0) -> tuple[Records, Records]:
        """(the rest, `n` records held out), both in file order and the same for the same `seed`."""
        if not 0 < n < len(self):
            raise SettingsError(
                f"cannot hold out {n} of {len(self)} records of {self.source}: choose 1 to {len(self) - 1}"
            )
        held = draw(len(self), n, seed)
        return self.pick(np.setdiff1d(np.arange(len(self)), held)), self.pick(held)


def fault(where: Where | str, problem: str, step: str = "") -> DataError:
    """The error of one record: place, problem, next step."""
    return DataError(f"{where}: {problem}" + (f"; {step}" if step else ""))


def choice(what: str, value: str, known: tuple[str, ...]) -> str:
    """`value` if it is one of `known`, else a `SettingsError` that names the setting and the nearest value."""
    if value not in known:
        raise SettingsError(f"{what}={value!r} is unknown{suggest(str(value), known)}")
    return value
