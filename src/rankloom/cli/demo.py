"""`rankloom demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankloom.cli.options import Json
from rankloom.cli.screen import screen


def demo(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write; default: a temporary one.")
    ] = None,
    json: Json = False,
) -> None:
    """The whole job in about a minute, with nothing to download: plan, train, judge, save, reload, merge, generate."""
    with screen(json) as show:
        from rankloom.recipes.demo import run_demo

        found = run_demo(out, tell=show.stage)
        show.result(found.as_dict())
        show.table(found.columns, found.rows())
        show.facts([*found.places(), ("time", f"{found.seconds:.0f} s")])
        for command in found.next_commands:
            show.text(f"next: {command}")
        show.text("your own: model=FOLDER or model=OWNER/NAME of the hub, and data=FILE (rankloom settings data)")
