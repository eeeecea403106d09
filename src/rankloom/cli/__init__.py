"""The command line: one file for each command, no logic. Heavy libraries are imported when a command runs."""

from __future__ import annotations


def main() -> None:
    """Entry point of the command `rankloom`."""
    from rankloom.cli.app import app

    app()
