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
        from rankloom.hf.job import eval_job
        from rankloom.hf.place import find_place

        path, changes = split(arguments)
        place = find_place(path, [*WHOLE, *changes] if any(map(names_data, changes)) else changes)
        found = eval_job(place.config, place.adapter, tell=out.stage)
        out.result(found)
        out.table(
            ("metric", *found), [(metric, *(each[metric] for each in found.values())) for metric in found["base"]]
        )
