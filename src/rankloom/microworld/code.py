"""Tasks about programs: run, summarise, write, review, fix."""

from __future__ import annotations

from random import Random

from rankloom.microworld.item import Item
from rankloom.microworld.minilang import Case, Program, draw_broken, draw_program, run, summary, text


def _key(program: Program) -> str:
    return f"program/{text(program)}"


def program_run(rng: Random) -> Item:
    """What number a program shows."""
    program = draw_program(rng)
    return Item(_key(program), f"Run:\n{text(program)}", str(run(program)[0]))


def program_summary(rng: Random) -> Item:
    """A program in words."""
    program = draw_program(rng)
    return Item(_key(program), f"Summarise:\n{text(program)}", summary(program))


def program_write(rng: Random) -> Item:
    """Words to a program."""
    program = draw_program(rng)
    return Item(_key(program), f"Write: {summary(program)}", text(program))


def program_review(rng: Random) -> Item:
    """What is wrong with a program; a third of them are sound."""
    program = draw_program(rng)
    sound = Case(program, "ok", program)
    case = sound if rng.random() < 1 / 3 else draw_broken(rng, program)
    return Item(_key(program), f"Review:\n{text(case.program)}", case.review)


def program_fix(rng: Random) -> Item:
    """A broken program repaired."""
    program = draw_program(rng)
    case = draw_broken(rng, program)
    return Item(_key(program), f"Fix:\n{text(case.program)}", text(case.fixed))
