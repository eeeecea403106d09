"""A tiny programming language: programs of a few lines, what they show, what they do in words, and what breaks them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from rankloom.errors import RankloomError

VARIABLES = "abcdxyz"
TYPOS = {
    "set": ("ste", "sett"),
    "add": ("ad", "adn"),
    "take": ("tkae", "tak"),
    "double": ("doubel", "duble"),
    "show": ("shwo", "shw"),
}
_WORDS = {
    "set": "set {0} to {1}",
    "add": "add {1} to {0}",
    "take": "take {1} from {0}",
    "double": "double {0}",
    "show": "show {0}",
}


class ProgramError(RankloomError):
    """A program cannot run; the text is the review that names the line."""


@dataclass(frozen=True)
class Statement:
    """One line: a command, its variable, and its number or second variable (``""`` for ``double`` and ``show``)."""

    command: str
    variable: str
    value: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.command, self.variable, self.value)))


Program = tuple[Statement, ...]


@dataclass(frozen=True)
class Case:
    """A program, the review it deserves, and the program as it should be."""

    program: Program
    review: str
    fixed: Program


def text(program: Program) -> str:
    """The source, one statement a line."""
    return "\n".join(map(str, program))


def parse(source: str) -> Program:
    """The program in `source`; the inverse of `text`."""
    return tuple(Statement(*line.split()) for line in source.splitlines())


def summary(program: Program) -> str:
    """What the program does, in words."""
    return ", ".join(_WORDS[s.command].format(s.variable, s.value) for s in program)


def run(program: Program) -> list[int]:
    """The numbers shown, in order; `ProgramError` for an unknown command, an unset variable, or nothing shown."""
    values: dict[str, int] = {}
    shown: list[int] = []
    for number, line in enumerate(program, 1):
        if line.command not in _WORDS:
            raise ProgramError(f"line {number}: {line.command} is no command")
        for name in (line.variable * (line.command != "set"), line.value):
            if name.isalpha() and name not in values:
                raise ProgramError(f"line {number}: {name} was never set")
        operand = values[line.value] if line.value.isalpha() else int(line.value or 0)
        before = values.get(line.variable, 0)
        results = {"set": operand, "add": before + operand, "take": before - operand, "double": 2 * before}
        values[line.variable] = results.get(line.command, before)
        if line.command == "show":
            shown.append(before)
    if not shown:
        raise ProgramError("nothing is shown")
    return shown


def review(program: Program) -> str:
    """``ok``, or the first thing that is wrong."""
    try:
        run(program)
    except ProgramError as error:
        return str(error)
    return "ok"


def draw_program(rng: Random) -> Program:
    """A correct program of three to five lines that shows one number from 0 to 39."""
    while True:
        program = _attempt(rng)
        if 0 <= run(program)[0] < 40:
            return program


def _attempt(rng: Random) -> Program:
    names = rng.sample(VARIABLES, rng.choice((1, 1, 2)))
    lines = [Statement("set", name, str(rng.randint(1, 9))) for name in names]
    main = names[-1]
    for _ in range(rng.randint(1, 2)):
        command = rng.choice(("add", "add", "take", "double"))
        amount = names[0] if len(names) == 2 and rng.random() < 0.6 else str(rng.randint(1, 9))
        lines.append(Statement(command, main, "" if command == "double" else amount))
    return (*lines, Statement("show", main))


def draw_broken(rng: Random, program: Program) -> Case:
    """`program` with one planted bug: a misspelt command, a ``set`` of the wrong variable, or the ``show`` lost.

    The repair is always `program` itself, and no two programs share a broken form.
    """
    kind = rng.choice(("typo", "typo", "unset", "silent"))
    if kind == "silent":
        broken = program[:-1]
    elif kind == "unset":
        at = next(i for i, s in enumerate(program) if s.variable == program[-1].variable)
        broken = _with(program, at, replace(program[at], variable=rng.choice(_unused(program))))
    else:
        at = rng.randrange(len(program))
        broken = _with(program, at, replace(program[at], command=rng.choice(TYPOS[program[at].command])))
    return Case(broken, review(broken), program)


def _with(program: Program, at: int, line: Statement) -> Program:
    return (*program[:at], line, *program[at + 1 :])


def _unused(program: Program) -> list[str]:
    return [name for name in VARIABLES if all(name not in (s.variable, s.value) for s in program)]
