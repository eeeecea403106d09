"""`rankloom info`."""

from __future__ import annotations

from typing import Annotated

import typer

from rankloom.cli.options import Json
from rankloom.cli.screen import screen


def info(
    path: Annotated[
        str, typer.Argument(help="A run's folder, an adapter's folder, or a model (folder, hub id, microworld).")
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="How a model is loaded: revision=…", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """What a folder or model holds: an adapter's settings, a run's numbers, a model's layers and their names."""
    with screen(json) as out:
        from rankloom.jobs.describe import describe

        found = describe(path, changes or ())
        out.result(found.data)
        out.facts(found.facts)
        for table in found.tables:
            out.table(table.columns, table.rows, table.title)
