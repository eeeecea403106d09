"""The command line: one file for each command, no logic. Heavy libraries are imported when a command runs."""

from __future__ import annotations

from typing import Any


def main() -> None:
    """Entry point of the command `rankloom`."""
    from rankloom.cli.commands import app

    app()


def __getattr__(name: str) -> Any:
    if name == "app":
        from rankloom.cli.commands import app

        return app
    raise AttributeError(f"module 'rankloom.cli' has no attribute {name!r}")
