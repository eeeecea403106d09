"""Inputs grown from a grammar, which shares no picture of an attack with anybody: YAML, JSON, regular expressions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

WORDS = ("model", "data", "plan", "train", "out", "seed", "name", "path", "source", "method", "r", "lr", "steps", "labels",
         "target_modules", "rank_pattern", "betas", "trust_remote_code", "cache", "report_to", "store", "rules")  # fmt: skip
SCALARS = (
    "", "~", "null", "true", "no", "1", "-0", "1e3", ".nan", "-.inf", "0x1f", "0o7", "1:30", "2001-01-01", "=", "<<", "'x'",
    '"\\u0000"', '"\\ud800"', '"\\x1b[31m"', "!!binary aGk=", "!!set {a}", "!!int '3'", "!x y", "|\n  block", ">-\n  folded",
    "9" * 25, "1." + "0" * 400, "lora", "dora", "[[]]", "{}", "\u2028", "#", "- ", "a: b",
)  # fmt: skip
PIECES = (".", "q_proj", "a", r"\w", r"\d+", "[^.]", ".*", ".*?", r"\.", "^", "$", r"\b", "(a|a)", "(?=q)", "(?!x)", "(?i:Q)",
          r"(a)\1", "(?<=a)", "[", "(", ")", "?", "{3}", "|", "\\")  # fmt: skip
ENDS = ("*", "+", "?", "*?", "{2}", "{0,30}", "{26}", "{2,}", "{9999}", "++", "")


def expression(draw: random.Random, depth: int = 4) -> str:
    """A regular expression, or nearly one: of many ways as often as not."""
    if depth == 0 or draw.random() < 0.2:
        return draw.choice(PIECES)
    inner = expression(draw, depth - 1)
    match draw.randrange(5):
        case 0:
            return f"({inner}|{expression(draw, depth - 1)})"
        case 1:
            return f"(?:{inner}){draw.choice(ENDS)}"
        case 2:
            return inner + expression(draw, depth - 1)
        case 3:
            return (inner * draw.randint(2, 40))[:400]
        case _:
            return inner + draw.choice(ENDS)


def yaml(draw: random.Random, depth: int = 4, indent: str = "") -> str:
    """A YAML document: keys of every type, in flow and in block style, anchors and merges among them."""
    if depth == 0 or draw.random() < 0.15:
        return f" {draw.choice(SCALARS)}\n"
    if draw.random() < 0.2:
        return f" {_flow(draw, depth)}\n"
    lines = []
    for _ in range(draw.randint(1, 4)):
        mark = draw.choice(("", "", "", "&a ", "*a ", "!!map "))
        key = draw.choice((*WORDS, *WORDS, *SCALARS, "? [a, b]\n" + indent, _flow(draw, 1)))
        head = "- " if draw.random() < 0.2 else f"{key}: "
        lines.append(f"{indent}{head}{mark}{yaml(draw, depth - 1, indent + '  ')}")
    return "\n" + "".join(lines)


def _flow(draw: random.Random, depth: int) -> str:
    if depth == 0:
        return draw.choice(SCALARS).partition("\n")[0]
    parts = [_flow(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    if draw.random() < 0.5:
        return f"[{', '.join(parts)}]"
    return "{" + ", ".join(f"{draw.choice((*WORDS, *parts, '1', '~', 'true'))}: {part}" for part in parts) + "}"


def config(draw: random.Random, fields: list[str]) -> dict[str, Any]:
    """The config of an adapter: fields that there are and that there are not, with values of every kind."""
    found = {field: value(draw, 3) for field in draw.sample(fields, draw.randint(0, len(fields)))}
    for _ in range(draw.randint(0, 2)):
        found[draw.choice((*WORDS, expression(draw, 2), "\x1b[2J", "a.b", ""))] = value(draw, 2)
    return found


def value(draw: random.Random, depth: int) -> Any:
    """A value of JSON."""
    plain: tuple[Callable[[], Any], ...] = (
        lambda: draw.choice((None, True, False, 0, 1, -1, 8, 2**31, 10**18, 0.5, -1e300)),
        lambda: draw.choice(("", "q_proj", "all-linear", "LORA", "\ud800", "a\n# b", "../x", "x" * 5000)),
        lambda: expression(draw),
    )
    if depth == 0 or draw.random() < 0.6:
        return draw.choice(plain)()
    if draw.random() < 0.5:
        return [value(draw, depth - 1) for _ in range(draw.randint(0, 3))]
    return {expression(draw, 2): value(draw, depth - 1) for _ in range(draw.randint(0, 3))}


def raw_yaml(draw: random.Random) -> bytes:
    """A YAML document as bytes."""
    return yaml(draw).encode("utf-8", "surrogatepass")


def raw_config(draw: random.Random, fields: list[str]) -> bytes:
    """A config as bytes."""
    return json.dumps({"peft_type": "LORA", **config(draw, fields)}).encode()
