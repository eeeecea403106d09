"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from rankloom.errors import SettingsError

CHANGE = re.compile(r"[A-Za-z_][\w.-]*=.*", re.DOTALL)
HELP = "A YAML file, or the folder of a run, adapter or model; then changes: model=… data=… method=dora r=4 lr=1e-3."

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on standard output and nothing else.")]
Arguments = Annotated[list[str] | None, typer.Argument(metavar="[PATH] [KEY=VALUE]...", help=HELP, show_default=False)]
ArgumentsOut = Annotated[
    list[str] | None, typer.Argument(metavar="[PATH] [OUT] [KEY=VALUE]...", help=HELP, show_default=False)
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The folder to write.", show_default=False)]


def split(arguments: list[str] | None) -> tuple[Path | None, list[str]]:
    """(the path, the changes) of a command's arguments."""
    plain, changes = _parted(arguments)
    if len(plain) > 1:
        raise SettingsError(f"one path at most, got {' and '.join(plain)}; write changes as key=value")
    return (Path(plain[0]) if plain else None), changes


def split_out(arguments: list[str] | None, out: Path | None) -> tuple[Path | None, Path, list[str]]:
    """(the path, the folder to write, the changes): the folder is `--out` or the last path."""
    plain, changes = _parted(arguments)
    paths = [*map(Path, plain), *([out] if out is not None else [])]
    if not paths or (out is None and len(paths) < 2):
        raise SettingsError("no folder to write is given: add --out FOLDER, or name it after the run's folder")
    if len(paths) > 2:
        raise SettingsError(f"a run's folder and one to write, got {' and '.join(map(str, paths))}")
    return (paths[0] if len(paths) == 2 else None), paths[-1], changes


def split_prompts(arguments: list[str] | None, prompts: list[str] | None) -> tuple[Path | None, list[str], list[str]]:
    """(the path, the prompts, the changes): plain words are prompts, but for a leading path where no model is given."""
    plain, changes = _parted(arguments)
    named = any(change.startswith(("model=", "model.path=")) for change in changes)
    leads = bool(plain) and (not named or Path(plain[0]).exists())
    return (Path(plain[0]) if leads else None), [*plain[leads:], *(prompts or [])], changes


def _parted(arguments: list[str] | None) -> tuple[list[str], list[str]]:
    given = arguments or []
    return [a for a in given if not CHANGE.fullmatch(a)], [a for a in given if CHANGE.fullmatch(a)]
