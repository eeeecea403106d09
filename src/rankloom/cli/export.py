"""`rankloom export`."""

from __future__ import annotations

from typing import Annotated

import typer

from rankloom.cli.options import ArgumentsOut, Json, Out, split_out
from rankloom.cli.screen import screen


def export(
    arguments: ArgumentsOut = None,
    out: Out = None,
    as_: Annotated[str, typer.Option("--as", help="The kind of file: lora.")] = "lora",
    r: Annotated[int | None, typer.Option("--r", help="Highest rank; default: exact, or 8.")] = None,
    json: Json = False,
) -> None:
    """Write an adapter of any mergeable method as plain LoRA, by SVD, with its error in weights and in outputs."""
    with screen(json) as show:
        from rankloom.jobs.export import export_job
        from rankloom.jobs.opening import open_path

        path, target, changes = split_out(arguments, out)
        opened = open_path(path, changes)
        found = export_job(opened.config, opened.need_adapter(), target, as_, r)
        show.result(found.as_dict())
        worst = sorted(found.errors.items(), key=lambda pair: -pair[1])[:5]
        show.table(("layers with the largest error", "relative error"), worst)
        rows = (("this LoRA", found.outputs), ("for a measure, the bare base", found.change))
        show.table(
            ("outputs, against the adapter's", "largest", "relative", "same choice"),
            [(what, d.largest, d.relative, d.same_choice) for what, d in rows],
        )
        show.facts(
            [
                ("measured on", found.measured_on),
                ("relative error in weights", found.error),
                ("adapter", found.saved.folder),
                ("loads in", found.saved.compat),
            ]
        )
