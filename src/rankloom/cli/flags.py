"""Settings written as options, `--lr 1e-3`: answered with how they are written here."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperCommand

from rankloom.errors import suggest

FLAG = re.compile(r"--([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)


class Command(TyperCommand):
    """A command whose unknown options, where it takes settings, are met with the setting that was meant."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if any(p.name == "arguments" for p in self.params):
            self.ignore_unknown_options = True

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises `typer.Exit` (2) with one line where an argument is an option that this command does not have."""
        rest: list[str] = super().parse_args(ctx, args)
        given = ctx.params.get("arguments") or []
        for place, argument in enumerate(given):
            if found := FLAG.fullmatch(argument):
                after = given[place + 1] if place + 1 < len(given) else ""
                value = found[2] if found[2] is not None else "" if after.startswith("--") else after
                typer.echo(f"error: {self._advice(found[1], value)}", err=True)
                raise typer.Exit(2)
        return rest

    def _advice(self, name: str, value: str) -> str:
        from rankloom.train.configfile import foreign, is_setting

        key = name.replace("-", "_")
        said = f"there is no option --{name}"
        if better := foreign(key, value):
            return f"{said}{better}"
        if is_setting(key):
            return f"{said}: settings are written key=value: {key}={value or 'true'}"
        own = [each for p in self.params for each in p.opts]
        near = suggest(f"--{name}", own, all_of_few=False)
        return f"{said}{near}; settings are written key=value, as in lr=1e-3, and `rankloom settings` lists them"
