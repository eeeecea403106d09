"""`rankloom chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from rankloom.cli.options import Arguments, Json, split
from rankloom.cli.screen import Screen, screen

LEAVE = ("/exit", "/quit", "/bye")


def chat(
    arguments: Arguments = None,
    system: Annotated[str | None, typer.Option(help="A system message that stands before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this probability.")] = 1.0,
    json: Json = False,
) -> None:
    """Talk with a model, line by line, until Ctrl-D or `/exit`; `/help` lists the other commands."""
    with screen(json) as out:
        from rankloom.hf.generate import Decoding
        from rankloom.jobs.opening import open_path
        from rankloom.jobs.talk import Conversation

        path, changes = split(arguments)
        opened = open_path(path, changes)
        talk = Conversation.start(opened, Decoding(max_new_tokens, temperature, top_p, opened.config.seed), system)
        for line in _lines(out):
            talk.say(line, out.piece)
            out.text("")
        out.result(talk.turns())


def _lines(out: Screen) -> Iterator[str]:
    """What is typed, empty lines left out, up to the end or `/exit`."""
    person = sys.stdin.isatty()
    while True:
        if person:
            out.piece("you> ")
        line = sys.stdin.readline()
        if not line or line.strip() in LEAVE:
            return
        if line.strip():
            yield line.strip()
