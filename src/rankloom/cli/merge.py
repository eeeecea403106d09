"""`rankloom merge`."""

from __future__ import annotations

from typing import Annotated

import typer

from rankloom.cli.options import ArgumentsOut, Json, Out, split_out
from rankloom.cli.screen import screen, size


def merge(
    arguments: ArgumentsOut = None,
    out: Out = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative error that is accepted.")] = None,
    json: Json = False,
) -> None:
    """Fold an adapter into its model for good and save it as a plain model, with the error measured."""
    with screen(json) as show:
        from rankloom.hf.merge import merge_job
        from rankloom.hf.place import find_place

        path, target, changes = split_out(arguments, out)
        place = find_place(path, changes)
        found = merge_job(place.config, place.need_adapter(), target, tolerance)
        show.result(found.as_dict())
        show.table(
            ("against the unmerged model", "largest", "relative", "same choice"),
            [
                ("folded in", found.merged.largest, found.merged.relative, found.merged.same_choice),
                ("read back", found.saved.largest, found.saved.relative, found.saved.same_choice),
            ],
        )
        show.facts([("measured on", found.measured_on), ("model", f"{found.out} ({size(found.size)})")])
