"""Who may import whom: the law of the architecture, read off the source text."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "rankloom"
FLOOR = {"errors", "settings"}
PARTS = {"files", "core", "store", "ops", "methods", "gates", "starts", "rules", "optim"}
MIDDLE = PARTS | {
    "registry",
    "presets",
    "compose",
    "objectives",
    "formats",
    "train",
    "theory",
    "systems",
    "microworld",
    "settings",
}
UPPER = MIDDLE | {"continual", "unlearn", "federated", "longcontext", "serve", "testing"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "store": {"ops"},
    "ops": set(),
    "files": set(),
    "core": {"store", "ops", "registry"},
    **dict.fromkeys(("methods", "gates", "starts", "rules", "optim"), PARTS),
    "registry": set(),
    "settings": {"registry"},
    "systems": {"core", "registry"},
    "microworld": set(),
    **dict.fromkeys(("presets", "compose", "objectives", "formats", "train", "theory"), MIDDLE),
    **dict.fromkeys(("continual", "unlearn", "federated", "longcontext", "serve", "testing"), UPPER),
    "hf": UPPER,
    "jobs": UPPER | {"hf"},
    "recipes": UPPER | {"hf", "jobs", "public"},
    "cli": UPPER | {"hf", "jobs", "public", "recipes"},
    "public": set(),
}
"""Room → rooms that it may import, beside itself and `errors`. `public` is the package's own `__init__`."""

OUTSIDE: dict[str, set[str]] = {
    "transformers": {"hf", "jobs", "recipes"},
    "peft": {"hf", "jobs", "recipes"},
    "datasets": {"hf", "jobs", "recipes"},
    "diffusers": {"hf", "jobs", "recipes"},
    "trl": {"hf", "jobs", "recipes"},
    "accelerate": {"train"},
    "flwr": {"federated"},
    "fastapi": {"serve"},
    "typer": {"cli"},
}
"""Library → the only rooms that may import it."""


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
    """Every import of every file below `source`, those inside functions and those for types only included."""
    for file in sorted(source.rglob("*.py")):
        parts = file.relative_to(source).parts
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for target in _targets(node, parts):
                    yield Import("/".join(parts), node.lineno, room_of(parts), target)


def circles(source: Path) -> list[str]:
    """Files below `source` that import one another in a circle, one line for each circle."""
    files = {file.relative_to(source).as_posix() for file in source.rglob("*.py")}
    graph: dict[str, set[str]] = {file: set() for file in files}
    for found in imports(source):
        target = _file_of(found.target, files)
        if target is not None and target != found.file:
            graph[found.file].add(target)
    order = TopologicalSorter(graph)
    try:
        order.prepare()
    except CycleError as error:
        return [" → ".join(error.args[1])]
    return []


def _file_of(target: str, files: set[str]) -> str | None:
    """The file of an imported module, or of the module that an imported name is in; None for another package."""
    parts = target.split(".")
    if parts[0] != PACKAGE:
        return None
    for end in (len(parts), len(parts) - 1):
        stem = "/".join(parts[1:end])
        for file in (f"{stem}.py", f"{stem}/__init__.py" if stem else "__init__.py"):
            if file in files:
                return file
    return None


def _targets(node: ast.Import | ast.ImportFrom, parts: tuple[str, ...]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    module = node.module or ""
    if node.level:
        above = (PACKAGE, *parts[: len(parts) - node.level])
        module = ".".join(filter(None, (*above, module)))
    return [f"{module}.{alias.name}" for alias in node.names]


def violations(source: Path) -> list[str]:
    """What breaks the law below `source`, one line each."""
    known = {room_of(file.relative_to(source).parts) for file in source.rglob("*.py")}
    strangers = [f"{room}/: no room of the architecture" for room in sorted(known - ROOMS.keys())]
    return strangers + [fault for found in imports(source) if (fault := _fault(found, known))]


def _fault(found: Import, known: set[str]) -> str | None:
    if found.room not in ROOMS:
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
