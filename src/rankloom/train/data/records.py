"""The canonical in-memory forms of a training example; each remembers the place it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, overload

from rankloom.errors import DataError, SettingsError, suggest

T = TypeVar("T")


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


@dataclass(frozen=True)
class Records:
    """A data set in canonical form. `labels`: class names by id (classification); `unused`: columns nobody read."""

    items: tuple[Record, ...]
    format: str
    source: str
    labels: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        return replace(self, items=self.items[index]) if isinstance(index, slice) else self.items[index]

    def divide(self, n: int, seed: int = 0) -> tuple[Records, Records]:
        """(the rest, `n` records held out), both in file order and the same for the same `seed`."""
        from rankloom.train.data.order import sample

        if not 0 < n < len(self):
            raise SettingsError(
                f"cannot hold out {n} of {len(self)} records of {self.source}: choose 1 to {len(self) - 1}"
            )
        held = set(sample(len(self), n, seed))
        return (
            replace(self, items=tuple(x for i, x in enumerate(self.items) if i not in held)),
            replace(self, items=tuple(x for i, x in enumerate(self.items) if i in held)),
        )


def fault(where: Where | str, problem: str, step: str = "") -> DataError:
    """The error of one record: place, problem, next step."""
    return DataError(f"{where}: {problem}" + (f"; {step}" if step else ""))


def choice(what: str, value: str, known: tuple[str, ...]) -> str:
    """`value` if it is one of `known`, else a `SettingsError` that names the setting and the nearest value."""
    if value not in known:
        raise SettingsError(f"{what}={value!r} is unknown{suggest(str(value), known)}")
    return value
