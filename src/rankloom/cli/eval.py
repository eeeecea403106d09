"""`rankloom eval`."""

from __future__ import annotations

from rankloom.cli.options import Arguments, Json, split
from rankloom.cli.screen import screen

WHOLE = tuple(
    f"data.{name}=null" for name in ("hold_out", "eval_source", "eval_split", "eval_examples", "eval_answers")
)
"""What makes every record of a source count that is named for this evaluation."""


def names_data(change: str) -> bool:
    """Whether a change says which data to judge by."""
    return change.partition("=")[0] in ("data", "data.source", "source")


def evaluate(arguments: Arguments = None, json: Json = False) -> None:
    """Loss, perplexity, accuracy, exact match of base and adapted model: `rankloom eval run data=test.jsonl`.

    Data named here are judged whole; else the records that the run holds out.
    """
    with screen(json) as out:
        from rankloom.jobs.opening import open_path
        from rankloom.jobs.runs import eval_job

        path, changes = split(arguments)
        opened = open_path(path, [*WHOLE, *changes] if any(map(names_data, changes)) else changes)
        found = eval_job(opened.config, opened.adapter, tell=out.stage)
        out.result(found)
        out.table(
            ("metric", *found), [(metric, *(each[metric] for each in found.values())) for metric in found["base"]]
        )
