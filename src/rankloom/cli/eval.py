"""`rankloom eval`."""

from __future__ import annotations

from rankloom.cli.options import Arguments, Json, split
from rankloom.cli.screen import screen


def evaluate(arguments: Arguments = None, json: Json = False) -> None:
    """Loss, perplexity, accuracy, exact match of base and adapted model: `rankloom eval run data=test.jsonl`."""
    with screen(json) as out:
        from rankloom.jobs.opening import open_path
        from rankloom.jobs.runs import eval_job

        path, changes = split(arguments)
        opened = open_path(path, changes)
        found = eval_job(opened.config, opened.adapter)
        out.result(found)
        out.table(
            ("metric", *found), [(metric, *(each[metric] for each in found.values())) for metric in found["base"]]
        )
