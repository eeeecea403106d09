"""Every promise about files and training runs, measured; exit code 1 if one does not hold.

usage: python bench/reliability.py [--row N …] [--sabotage] [--quick] [--seed N] [--json]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rankloom.cli.options import Json
from rankloom.cli.screen import screen

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "reliability"))

from reliability_board import board
from reliability_board.board import SEED, Budget, Result, run


def reliability(
    row: Annotated[list[int] | None, typer.Option(help="Only this row; may be given again.")] = None,
    sabotage: Annotated[
        bool, typer.Option("--sabotage", help="Break the product on purpose as well: every row must notice.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="The part that takes minutes.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random; fixed unless given.")] = None,
    json: Json = False,
) -> None:
    """Measure every promise about files and training runs; exit code 1 if one does not hold."""
    with screen(json) as out:
        budget = Budget(quick, SEED if seed is None else seed)
        typer.echo(f"seed {budget.seed}", err=True)
        results = []
        for number in row or board.numbers():
            typer.echo(f"row {number}: {board.row(number).promise} …", err=True)
            results.append(run(board.row(number), budget, sabotage))
            for line in _faults(results[-1]):
                typer.echo(f"  {line}", err=True)
        out.result({"rows": [r.data() for r in results]})
        out.table(
            ("row", "promise", "ok", "figure", "sabotages red", "seconds"),
            [(r.row.number, r.row.promise, r.finding.ok, r.finding.figure, r.sabotage_red, r.seconds) for r in results],
        )
    if not all(r.ok for r in results):
        raise typer.Exit(1)


def _faults(result: Result) -> list[str]:
    shown = [] if result.finding.ok else list(result.finding.details[:20])
    return [*shown, *(f"the sabotage {name!r} was not noticed" for name in result.green or ())]


if __name__ == "__main__":
    typer.run(reliability)
