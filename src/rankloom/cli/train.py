"""`rankloom train`."""

from __future__ import annotations

from typing import Annotated

import typer

from rankloom.cli.command import speaks
from rankloom.cli.options import Arguments, Json, split
from rankloom.cli.screen import screen, size


def train(
    arguments: Arguments = None,
    resume: Annotated[
        str | None,
        typer.Option(help="'auto': go on from the newest good checkpoint in out=; or a checkpoint's folder."),
    ] = None,
    json: Json = False,
) -> None:
    """Fine-tune, judged before and after: `rankloom train model=microworld data=microworld:list_rotate#900 out=run`."""
    with screen(json) as out:
        from rankloom.jobs.after import next_commands
        from rankloom.jobs.opening import open_path
        from rankloom.jobs.runs import train_job

        path, changes = split(arguments)
        trained = train_job(open_path(path, changes).config, resume=resume or False, tell=out.stage)
        found = trained.result
        if not speaks():
            return
        out.result(found.as_dict())
        out.table(("metric", "before", "after"), [(k, found.before.get(k), v) for k, v in found.after.items()])
        for before, after in found.answers[:3]:
            out.text(
                f"{before.prompt}\n  before   {before.given}\n  after    {after.given}\n  expected {after.expected}"
            )
        out.facts(
            [
                ("steps", f"{found.steps} ({found.stopped}) in {found.seconds:.1f} s, {found.tokens:,} tokens"),
                ("trainable", f"{found.trainable:,} of {found.total:,} ({100 * found.trainable / found.total:.3g} %)"),
                ("adapter", f"{found.adapter} ({size(sum(x.stat().st_size for x in found.adapter.iterdir()))})"),
                ("run", found.out),
                ("loss curve", found.curve),
                ("loads in", found.compatibility),
            ]
        )
        for note in (note for note in found.notes if note not in out.told):
            out.text(f"note: {note}")
        for command in next_commands(trained):
            out.text(f"next: {command}")
