"""`rankloom generate`."""

from __future__ import annotations

from shlex import quote
from typing import Annotated

import typer

from rankloom.cli.options import HELP, Json, split_prompts
from rankloom.cli.screen import screen
from rankloom.errors import SettingsError


def generate(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[PATH] [KEY=VALUE]... [PROMPT]...", help=HELP, show_default=False)
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What is asked; may be repeated. Default: standard input."),
    ] = None,
    raw: Annotated[bool, typer.Option(help="Continue the text as it is, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens with this probability.")] = 1.0,
    json: Json = False,
) -> None:
    """Answer prompts with a run's or adapter's folder, or a bare model: `rankloom generate run "Rotate: 1 2 3"`."""
    with screen(json) as out:
        from rankloom.hf.generate import Decoding
        from rankloom.jobs.opening import open_path
        from rankloom.jobs.talk import answer_job

        path, given, changes = split_prompts(arguments, prompt)
        try:
            opened = open_path(path, changes)
        except SettingsError as error:
            told = next((change for change in changes if f"argument {change!r}" in str(error)), None)
            raise error if told is None else SettingsError(f"{error}; if it is the prompt: -p {quote(told)}") from None
        decoding = Decoding(max_new_tokens, temperature, top_p, opened.config.seed)
        prompts = given or [typer.get_text_stream("stdin").read()]
        found = answer_job(opened, prompts, decoding, raw=raw)
        out.result([{"prompt": p, "answer": a} for p, a in zip(prompts, found)])
        for answer in found:
            out.text(answer)
