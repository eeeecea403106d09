"""`rankloom settings`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from rankloom.cli.options import Json
from rankloom.cli.screen import screen


def settings(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="[KEY]",
            help="A setting (lr, train.lr), a section (train), or a method, rule, start or store by name.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """What can be set in a YAML file or as key=value: each setting, what it takes, its default, what it means."""
    with screen(json) as out:
        from rankloom.train.config import settings_table

        found = settings_table(key)
        out.result([dataclasses.asdict(f) for f in found])
        out.table(("setting", "default", "takes", "meaning"), [(f.name, str(f.default), f.type, f.doc) for f in found])
