"""Every system of the survey: where it stands there, which parts make it, what runs it, what proves it.

The table lies in `systems.csv` beside this file. A system is *planned* until a test proves it.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module, resources
from typing import Any, Literal, get_args

from rankloom.errors import SettingsError, suggest
from rankloom.registry import METHODS, maker, name_of
from rankloom.settings import Settings
from rankloom.settings.reference import Field, describe

Status = Literal["works", "planned"]
ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")


@dataclass(frozen=True)
class System:
    """One system. `section`: of the survey; `parts`: modules of this package that it is made of; `runs`: registered
    names that run it; `proof`: the pytest id of the test that holds it to its paper, empty while there is none.
    """

    id: str
    name: str
    section: str
    parts: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    proof: str = ""

    @property
    def status(self) -> Status:
        """`works` where a proof is named."""
        return "works" if self.proof else "planned"

    def row(self) -> dict[str, str | None]:
        """id, name, section, status and proof, as JSON takes them."""
        return {
            "id": self.id,
            "name": self.name,
            "section": self.section,
            "status": self.status,
            "proof": self.proof or None,
        }


@dataclass(frozen=True)
class MethodFacts(Settings):
    """A registered method. `arxiv`: of its paper, empty if none is named; `kinds`: the layers it adapts; `mergeable`:
    whether its change has one matrix; `rules`: names of the training rules that it brings; `preset`: a choice of parts.
    """

    name: str
    summary: str
    arxiv: str
    settings: tuple[Field, ...]
    mergeable: bool
    kinds: tuple[str, ...]
    rules: tuple[str, ...]
    preset: bool


@cache
def _table() -> tuple[System, ...]:
    text = resources.files("rankloom").joinpath("systems.csv").read_text(encoding="utf-8")
    return tuple(
        System(r["id"], r["name"], r["section"], tuple(r["parts"].split()), tuple(r["runs"].split()), r["proof"])
        for r in csv.DictReader(text.splitlines())
    )


def list_systems() -> list[System]:
    """Every system, in the order of the survey."""
    return list(_table())


def select(status: str | None = None, section: str | None = None) -> list[System]:
    """Those with a status and of a section (4.1 takes in 4.1.2). Raises `SettingsError` for an unknown one."""
    found = list_systems()
    if status not in (None, *get_args(Status)):
        raise SettingsError(f"there is no status {status!r}{suggest(str(status), get_args(Status))}")
    if section is not None:
        known = {s.section for s in found}
        found = [s for s in found if s.section == section or s.section.startswith(f"{section}.")]
        if not found:
            raise SettingsError(f"the survey has no section {section!r} with systems{suggest(section, known)}")
    return [s for s in found if status in (None, s.status)]


@cache
def _listed() -> Mapping[str, MethodFacts]:
    """The facts in `methods.json`, which `tools/make_docs.py` writes: they are read without importing torch."""
    rows = json.loads(resources.files("rankloom").joinpath("methods.json").read_text(encoding="utf-8"))
    return {row["name"]: MethodFacts(**row) for row in rows}


def method(name: str) -> MethodFacts:
    """One registered method. Raises `SettingsError` with near names for an unknown one."""
    if name not in METHODS:
        raise SettingsError(f"there is no method {name!r}{suggest(name, METHODS)}")
    return _listed().get(name) or found_facts(name)


def list_methods() -> list[MethodFacts]:
    """Every registered method, by name."""
    return [method(name) for name in sorted(METHODS)]


def found_facts(name: str) -> MethodFacts:
    """The facts of a registered method as they are found: kinds and mergeability by building it on small layers."""
    from rankloom.core.method import Method
    from rankloom.core.plan import as_plan

    made = maker(name)
    plan = as_plan(made())
    found = _tried(plan.method)
    rules = [*plan.method.rules(), *plan.rules]
    return MethodFacts(
        name=name,
        summary=_summary(made),
        arxiv=_arxiv(made, type(plan.method)),
        settings=tuple(describe(made, Method)),
        mergeable=any(found.values()),
        kinds=tuple(found),
        rules=tuple(name_of(type(rule)) or type(rule).__name__ for rule in rules),
        preset=not isinstance(made, type),
    )


def _summary(made: Any) -> str:
    """The first sentence about a preset, or the first line of a method's module: its idea."""
    text = made.__doc__ if not isinstance(made, type) else import_module(made.__module__).__doc__
    return (text or "").strip().split("\n")[0].rstrip(".")


def _arxiv(made: Any, method: type) -> str:
    for text in (made.__doc__, import_module(method.__module__).__doc__):
        found = ARXIV.search(text or "")
        if found:
            return found[1]
    return ""


def _tried(method: Any) -> Mapping[str, bool]:
    """{kind: whether the change has a matrix} for each kind of layer that the method can be built on."""
    from rankloom.core.site import LAYER, Site
    from rankloom.errors import NotMergeable, TargetError

    found: dict[str, bool] = {}
    for kind, layer in _specimens():
        weight = kind.tensor(layer)
        slot = kind.parameter() if kind.name == "parameter" else LAYER
        site = Site.of(kind.name, layer, slot, kind)
        site.widest, site.dtype, site.device = (site.out, site.in_), weight.dtype, weight.device
        try:
            adapter = method.build(site)
        except (TargetError, SettingsError):  # SettingsError: it needs to be told more than its defaults
            continue
        if adapter is None:
            continue
        base = site.base
        try:
            adapter.reset(base)
            adapter.delta(base)
        except NotMergeable:
            if not site.bare:
                found[kind.name] = False
        else:
            found[kind.name] = True
    return found


def _specimens() -> list[tuple[Any, Any]]:
    """A small layer of each kind, large enough for the default ranks."""
    import torch
    from torch import nn

    from rankloom.core.kinds import KINDS, Bare

    n = 96
    transposed = nn.Module()
    transposed.weight = nn.Parameter(torch.zeros(n, n))
    layers = {
        "conv1d": nn.Conv1d(n, n, 1),
        "conv1d_transposed": transposed,
        "conv2d": nn.Conv2d(n, n, 1),
        "conv3d": nn.Conv3d(n, n, 1),
        "embedding": nn.Embedding(n, n),
        "linear": nn.Linear(n, n),
    }
    bare = nn.Module()
    bare.weight = nn.Parameter(torch.zeros(2, n, n))
    kinds = {kind.name: kind for kind in KINDS.values()}
    return [*((kinds[name], layer) for name, layer in sorted(layers.items())), (Bare("weight"), bare)]
