"""`rankloom plan`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import typer

from rankloom.cli.options import Arguments, Json, split
from rankloom.cli.screen import screen, size

if TYPE_CHECKING:
    from rankloom.jobs.plan import Memory


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
                ("stacked experts missed", _counted(found.stacked) or None),
                ("rules", found.rules or None),
                ("mergeable", found.mergeable),
                ("adapter file", size(found.file)),
                ("weights", "; ".join(f"{size(kept.bytes)} in {kept.how}" for kept in found.weights)),
                ("weights in other stores", "; ".join(f"{size(s.bytes)} in {s.store}" for s in found.stores) or None),
                ("adapters + gradients", size(memory.adapters + memory.gradients)),
                ("optimizer", size(memory.optimizer)),
                (f"activations, {memory.rows} × {memory.length} tokens", size(memory.activations)),
                ("memory in training", _memory(memory)),
            ]
        )
        for note in found.notes:
            out.text(f"note: {note}")
        for conflict in found.conflicts:
            out.text(f"conflict: {conflict}")
    if found.conflicts:
        raise typer.Exit(2)


def _counted(names: Iterable[str]) -> list[str]:
    """Names with block numbers left out, each with its count."""
    found = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return [f"{count} × {name}" for name, count in found.items()]


def _memory(memory: Memory) -> str:
    known = memory.activations is not None
    return (
        f"{'' if known else 'at least '}{size(memory.total)} (activations: {memory.formula if known else 'not known'})"
    )
