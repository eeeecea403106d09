"""`rankloom merge`."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from rankloom.cli.options import ArgumentsOut, Json, Out, split_out
from rankloom.cli.screen import Screen, screen, size

if TYPE_CHECKING:
    from rankloom.jobs.merge import MergeReport


class Into(StrEnum):
    """What an adapter is folded into."""

    dense = "16bit"
    store = "store"


def merge(
    arguments: ArgumentsOut = None,
    out: Out = None,
    into: Annotated[
        Into, typer.Option(help="The base as its files have it, packed weights made dense; or the packed base.")
    ] = Into.dense,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative error that is accepted.")] = None,
    verify: Annotated[
        bool, typer.Option(help="Measure the merged model against the unmerged; loads one after the other.")
    ] = True,
    json: Json = False,
) -> None:
    """Fold an adapter into its model for good and save it as a model, with the error measured."""
    with screen(json) as show:
        from rankloom.jobs.merge import merge_job
        from rankloom.jobs.opening import open_path

        path, target, changes = split_out(arguments, out)
        opened = open_path(path, changes)
        found = merge_job(opened.config, opened.need_adapter(), target, tolerance, into.value, verify)
        show.result(found.as_dict())
        _show(show, found)


def _show(show: Screen, found: MergeReport) -> None:
    rows = (
        ("merged: the adapter on the same base", found.error),
        ("merged: the adapter on the packed base it trained on", found.trained),
        ("for a measure, the bare base", found.change),
    )
    if found.error is not None:
        show.table(
            ("against", "largest", "relative", "same choice"),
            [(what, d.largest, d.relative, d.same_choice) for what, d in rows if d is not None],
        )
    worst = max(found.lost.items(), key=lambda item: item[1], default=None)
    show.facts(
        [
            ("measured on", found.measured_on),
            ("merged", found.how),
            *([("most lost by rounding", f"{worst[1]:.1%} of the change of {worst[0]}")] if worst else []),
            ("model", f"{found.out} ({size(found.size)})"),
        ]
    )
