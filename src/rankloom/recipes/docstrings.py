"""Sentences that every machine has: docstrings of the standard library, half of them with one pair of words swapped.

Every sentence has 7 to 18 words and occurs once; train and test share none. In a swapped one two neighbouring words
inside the sentence (never the first or last, letters only, different) have changed places. Nothing is shipped: the
sentences are read where Python is installed, so they differ a little between its versions.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from random import Random

SEED, TRAIN, TEST = 0, 2000, 784
SKIP = {"test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "distutils", "ensurepip"}
SENTENCE = re.compile(r"[A-Z][A-Za-z' ,;-]*\.")


def labelled() -> dict[str, list[tuple[str, int]]]:
    """{"train": …, "test": …} of (sentence, 1 if swapped), half of each swapped; the same at every call."""
    rng = Random(SEED)
    chosen = rng.sample(_sentences(), TRAIN + TEST)
    rows = [(_swapped(text, rng) if i % 2 else text, i % 2) for i, text in enumerate(chosen)]
    return {"train": rows[:TRAIN], "test": rows[TRAIN:]}


def _docstrings() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if SKIP & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ""


def _sentences() -> list[str]:
    found: dict[str, str] = {}
    for text in _docstrings():
        for paragraph in re.split(r"\n\s*\n", text):
            for part in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                if SENTENCE.fullmatch(part) and 7 <= len(part.split()) <= 18 and _places(part):
                    found.setdefault(part.lower(), part)
    return sorted(found.values())


def _places(sentence: str) -> list[int]:
    words = sentence.split()
    return [
        i
        for i in range(1, len(words) - 2)
        if words[i].isalpha() and words[i + 1].isalpha() and words[i].lower() != words[i + 1].lower()
    ]


def _swapped(sentence: str, rng: Random) -> str:
    words = sentence.split()
    i = rng.choice(_places(sentence))
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)
