"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankloom.errors import SettingsError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on standard output and nothing else.")]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PATH] [KEY=VALUE]...",
        help="A YAML file, a run's folder or an adapter's folder; then changes: model=… data=… method=dora r=4 lr=1e-3.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)]


def split(arguments: list[str] | None) -> tuple[Path | None, list[str]]:
    """(the path, the changes) of a command's arguments."""
    changes = [a for a in arguments or [] if "=" in a]
    paths = [a for a in arguments or [] if "=" not in a]
    if len(paths) > 1:
        raise SettingsError(f"one path at most, got {' and '.join(paths)}; write changes as key=value")
    return (Path(paths[0]) if paths else None), changes
