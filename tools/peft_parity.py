"""The parity table of the documentation: largest logit difference to PEFT by case and direction.

python tools/peft_parity.py
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "peft"))

import peft_cases as cases
import torch

from rankloom.formats.view import view

DIRECTIONS = {"to": ("ours → PEFT", cases.to_peft), "from": ("PEFT → ours", cases.from_peft)}


def kinds(one: cases.Case) -> str:
    """The kinds of the places that a case adapts."""
    adapted = view(cases.ours_adapted(one).rankloom, "default").adapted
    return ", ".join(sorted({site.kind.name for site, _ in adapted}))


def rows(chosen: list[cases.Case] | None = None) -> list[tuple[str, str, str, str]]:
    """(case, kinds, direction, difference) of every case both ways."""
    found = []
    for one in chosen or cases.CASES:
        for way, (name, measure) in DIRECTIONS.items():
            if way in one.ways:
                found.append((one.id, kinds(one), name, f"{measure(one):.1e}"))
    return found


def table(chosen: list[cases.Case] | None = None) -> str:
    """Markdown."""
    head = ("case", "sites", "direction", "largest logit difference")
    lines = [head, ("---",) * len(head), *rows(chosen)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(table())
