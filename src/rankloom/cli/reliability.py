"""`rankloom reliability`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rankloom.cli.options import Json
from rankloom.cli.screen import screen

if TYPE_CHECKING:
    from rankloom.reliability.board import Result


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
        from rankloom.reliability.board import SEED, Budget, numbers, run
        from rankloom.reliability.board import row as row_of

        budget = Budget(quick, SEED if seed is None else seed)
        typer.echo(f"seed {budget.seed}", err=True)
        results = []
        for number in row or numbers():
            typer.echo(f"row {number}: {row_of(number).promise} …", err=True)
            results.append(run(row_of(number), budget, sabotage))
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
