"""Who may import whom: the law of the architecture, read off the source text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "rankloom"
FLOOR = {"errors", "settings"}
PARTS = {"files", "core", "store", "ops", "methods", "gates", "starts", "rules", "optim"}
MIDDLE = PARTS | {"registry", "presets", "compose", "formats", "train", "theory", "systems", "microworld"}
UPPER = MIDDLE | {"continual", "unlearn", "federated", "longcontext", "serve", "testing"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "settings": {"registry"},
    "store": {"ops"},
    "ops": set(),
    "files": set(),
    "core": {"store", "ops", "registry"},
    **dict.fromkeys(("methods", "gates", "starts", "rules", "optim"), PARTS),
    "registry": set(),
    "systems": {"core", "registry"},
    "microworld": set(),
    **dict.fromkeys(("presets", "compose", "formats", "train", "theory"), MIDDLE),
    **dict.fromkeys(("continual", "unlearn", "federated", "longcontext", "serve", "testing"), UPPER),
    "hf": UPPER,
    "reliability": UPPER | {"hf", "public"},
    "recipes": UPPER | {"hf", "public"},
    "cli": UPPER | {"hf", "public", "recipes", "reliability"},
    "public": set(),
}
"""Room → rooms that it may import, beside itself and `errors`. `public` is the package's own `__init__`."""

OUTSIDE: dict[str, set[str]] = {
    "transformers": {"hf", "recipes", "reliability"},
    "peft": {"hf", "recipes", "reliability"},
    "datasets": {"hf", "recipes"},
    "diffusers": {"hf", "recipes"},
    "trl": {"hf", "recipes"},
    "accelerate": {"train"},
    "flwr": {"federated"},
    "fastapi": {"serve"},
    "typer": {"cli"},
}
"""Library → the only rooms that may import it."""

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("methods/__init__.py", "rankloom.systems"): "the package answers the public call rankloom.methods()",
}
"""(file, module) → why this import may break the law."""


@dataclass(frozen=True)
class Import:
    """One import in the source: where, and what."""

    file: str
    line: int
    room: str
    target: str


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a module path below the package; the package itself is `public`."""
    return parts[0].removesuffix(".py") if parts and parts[0] != "__init__.py" else "public"


def imports(source: Path) -> Iterator[Import]:
    """Every import of every file below `source`, those inside functions included, those for types only left out."""
    for file in sorted(source.rglob("*.py")):
        parts = file.relative_to(source).parts
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in _run(tree):
            for target in _targets(node, parts):
                yield Import("/".join(parts), node.lineno, room_of(parts), target)


def _run(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            for other in node.orelse:
                yield from _run(other)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        else:
            yield from _run(node)


def _is_type_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in (getattr(test, "id", ""), getattr(test, "attr", ""))


def _targets(node: ast.Import | ast.ImportFrom, parts: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    module = node.module or ""
    if node.level:
        above = (PACKAGE, *parts[: len(parts) - node.level])
        module = ".".join(filter(None, (*above, module)))
    if module == PACKAGE:
        return [f"{PACKAGE}.{alias.name}" for alias in node.names]
    return [module]


def violations(source: Path) -> list[str]:
    """What breaks the law below `source`, one line each."""
    known = {room_of(file.relative_to(source).parts) for file in source.rglob("*.py")}
    strangers = [f"{room}/: no room of the architecture" for room in sorted(known - ROOMS.keys())]
    return strangers + [fault for found in imports(source) if (fault := _fault(found, known))]


def _fault(found: Import, known: set[str]) -> str | None:
    if (found.file, found.target) in EXCEPTIONS or found.room not in ROOMS:
        return None
    top, _, rest = found.target.partition(".")
    here = f"{found.file}:{found.line}: "
    if top != PACKAGE:
        if found.room in OUTSIDE.get(top, {found.room}):
            return None
        return f"{here}{top} may be imported only in {', '.join(sorted(OUTSIDE[top]))}/"
    room = rest.partition(".")[0]
    if room == "__version__":
        return None
    room = room if room in known else "public"
    if room in ROOMS[found.room] | FLOOR | {found.room}:
        return None
    may = ", ".join(sorted(ROOMS[found.room])) or "nothing of ours"
    return f"{here}{found.room} may not import {room} ({found.target}); it may import {may}"
