"""`rankloom plan`."""

from __future__ import annotations

import typer

from rankloom.cli.options import Arguments, Json, split
from rankloom.cli.screen import screen, size


def plan(arguments: Arguments = None, json: Json = False) -> None:
    """The dry run: what is adapted and what is not, counts, memory, file size, conflicts. Exit code 2 on a conflict."""
    with screen(json) as out:
        from rankloom.jobs.opening import open_path
        from rankloom.jobs.plan import plan_run

        path, changes = split(arguments)
        planned = plan_run(open_path(path, changes).config)
        found, memory = planned.report, planned.report.memory
        out.result(planned.as_dict())
        for what, text in planned.stages:
            out.stage(what, text)
        out.table(
            ("layers", "kind", "shape", "trainable each"),
            [(f"{g.count} × {g.pattern}", g.kind, "×".join(map(str, g.shape)), g.trainable) for g in planned.groups],
            title=f"{found.method} on {len(found.sites)} sites of {found.model}",
        )
        out.facts(
            [
                ("trainable", f"{found.trainable:,} of {found.total:,} ({100 * found.trainable / found.total:.3g} %)"),
                ("trained whole", found.whole or None),
                ("linear layers missed", found.missed or None),
                ("rules", found.rules or None),
                ("mergeable", found.mergeable),
                ("adapter file", size(found.file)),
                ("weights", "; ".join(f"{size(kept.bytes)} in {kept.how}" for kept in found.weights)),
                ("weights in other stores", "; ".join(f"{size(s.bytes)} in {s.store}" for s in found.stores) or None),
                ("adapters + gradients", size(memory.adapters + memory.gradients)),
                ("optimizer", size(memory.optimizer)),
                (f"activations, {memory.rows} × {memory.length} tokens", size(memory.activations)),
                ("memory in training", f"{size(memory.total)} (activations: {memory.formula})"),
            ]
        )
        for note in found.notes:
            out.text(f"note: {note}")
        for conflict in found.conflicts:
            out.text(f"conflict: {conflict}")
    if found.conflicts:
        raise typer.Exit(2)
