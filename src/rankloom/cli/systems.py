"""`rankloom systems`."""

from __future__ import annotations

from typing import Annotated

import typer

from rankloom.cli.options import Json
from rankloom.cli.screen import screen


def systems(
    status: Annotated[str | None, typer.Option(help="Only those: works or planned.")] = None,
    section: Annotated[str | None, typer.Option(help="Only those of a section of the survey, such as 4.1.")] = None,
    json: Json = False,
) -> None:
    """Every system of the survey: which work, and the test that proves it."""
    with screen(json) as out:
        from rankloom.systems import select

        found = select(status, section)
        out.result([s.row() for s in found])
        out.table(
            ("id", "name", "section", "status", "proof"), [(s.id, s.name, s.section, s.status, s.proof) for s in found]
        )
        out.text(f"{sum(s.status == 'works' for s in found)} of {len(found)} work")
