"""The commands put together."""

from __future__ import annotations

from typing import Annotated

import typer

from rankloom.cli.chat import chat
from rankloom.cli.command import guarded
from rankloom.cli.demo import demo
from rankloom.cli.eval import evaluate
from rankloom.cli.export import export
from rankloom.cli.flags import Command
from rankloom.cli.generate import generate
from rankloom.cli.info import info
from rankloom.cli.limits import limits
from rankloom.cli.merge import merge
from rankloom.cli.methods import methods
from rankloom.cli.plan import plan
from rankloom.cli.quantize import quantize
from rankloom.cli.settings import settings
from rankloom.cli.systems import systems
from rankloom.cli.train import train

app = typer.Typer(
    name="rankloom",
    help="Every low-rank adaptation method in one place: fine-tune, judge, merge, export.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from rankloom import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Every low-rank adaptation method in one place: fine-tune, judge, merge, export."""


for _name, _function in (
    ("plan", plan),
    ("train", train),
    ("eval", evaluate),
    ("generate", generate),
    ("chat", chat),
    ("merge", merge),
    ("quantize", quantize),
    ("export", export),
    ("info", info),
    ("limits", limits),
    ("settings", settings),
    ("methods", methods),
    ("systems", systems),
    ("demo", demo),
):
    app.command(_name, cls=Command)(guarded(_function))
