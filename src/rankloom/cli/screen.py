"""Printing: tables for people, or one JSON value for machines."""

from __future__ import annotations

import contextlib
import io
import json as jsonlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rankloom.errors import CONTROL, one_line, printable

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 120
NOTHING = object()


class Screen:
    """Where a command prints. For machines everything but the result goes to standard error or nowhere."""

    def __init__(self, machine: bool) -> None:
        self.machine = machine
        self.data: Any = NOTHING
        self.told = ""
        self._console: Console | None = None

    @property
    def console(self) -> Console:
        """Standard output for people; nowhere for machines."""
        if self._console is None:
            from rich.console import Console

            if self.machine:
                self._console = Console(file=io.StringIO())
            else:
                self._console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
        return self._console

    def result(self, data: Any) -> None:
        """What a machine gets."""
        self.data = data

    def text(self, text: str) -> None:
        """Lines for people, control characters written out."""
        self.console.print(printable(text), markup=False, soft_wrap=True)

    def piece(self, text: str) -> None:
        """A part of a line for people, seen at once."""
        self.console.print(printable(text), markup=False, soft_wrap=True, end="")
        self.console.file.flush()

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
        """A table for people."""
        from rich.table import Column, Table
        from rich.text import Text

        heads = [Column(Text(one_line(column))) for column in columns]
        named = Text(one_line(title), style="bold") if title else None
        table = Table(*heads, title=named, title_justify="left", box=None, pad_edge=False)
        for row in rows:
            table.add_row(*(Text(printable(shown(cell))) for cell in row))
        self.console.print(table)

    def facts(self, pairs: Sequence[tuple[str, Any]]) -> None:
        """Name and value, line by line."""
        width = max(len(name) for name, _ in pairs)
        for name, value in pairs:
            self.text(f"{name:<{width}}  {one_line(shown(value))}")

    def stage(self, what: str, text: str) -> None:
        """One stage of a job, as it comes; `told` remembers it."""
        self.told += text
        self.text(
            f"{what}: {text}" if "\n" not in text else f"{what}:\n" + "\n".join(f"  {x}" for x in text.splitlines())
        )


@contextlib.contextmanager
def screen(machine: bool) -> Iterator[Screen]:
    """A screen; for machines standard output is kept clean, and the result is printed at the end."""
    found = Screen(machine)
    if not machine:
        yield found
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield found
    if found.data is not NOTHING:
        said = jsonlib.dumps(found.data, ensure_ascii=False, allow_nan=False)
        print(CONTROL.sub(lambda sign: f"\\u{ord(sign[0]):04x}", said))


def shown(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    return str(value)


def size(count: int | None) -> str:
    """Bytes as people read them."""
    if count is None:
        return "unknown"
    value, units = float(count), ("B", "KB", "MB", "GB", "TB")
    for unit in units:
        if value < 1000 or unit == units[-1]:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError
