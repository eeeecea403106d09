"""`rankloom eval`."""

from __future__ import annotations

from rankloom.cli.options import Arguments, Json, split
from rankloom.cli.screen import screen


def evaluate(arguments: Arguments = None, json: Json = False) -> None:
    """Loss, perplexity, accuracy, exact match of base and adapted model: `rankloom eval run data=test.jsonl`."""
    with screen(json) as out:
        from rankloom.hf.job import eval_job
        from rankloom.hf.place import find_place

        path, changes = split(arguments)
        place = find_place(path, changes)
        found = eval_job(place.config, place.adapter)
        out.result(found)
        out.table(
            ("metric", *found), [(metric, *(each[metric] for each in found.values())) for metric in found["base"]]
        )
