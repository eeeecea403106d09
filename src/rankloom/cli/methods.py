"""`rankloom methods`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from rankloom.cli.options import Json
from rankloom.cli.screen import screen


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """The registered methods, their papers, where they apply, whether they merge; or one with its settings."""
    with screen(json) as out:
        from rankloom import systems

        if name is None:
            found = systems.list_methods()
            out.result([dataclasses.asdict(m) for m in found])
            out.table(
                ("method", "arXiv", "merges", "idea"),
                [(m.name, m.arxiv or None, m.mergeable, m.summary) for m in found],
            )
            return
        one = systems.method(name)
        out.result(dataclasses.asdict(one))
        out.facts(
            [
                ("method", one.name),
                ("idea", one.summary),
                ("arXiv", one.arxiv or None),
                ("merges", one.mergeable),
                ("adapts", one.kinds),
                ("brings rules", one.rules or None),
            ]
        )
        out.table(
            ("setting", "default", "type", "meaning"), [(s.name, str(s.default), s.type, s.doc) for s in one.settings]
        )
