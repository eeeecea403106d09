"""Rank and scale of every place as PEFT's r, lora_alpha and their patterns, and back."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from rankloom.core.adapter import Adapter
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.core.targets import pattern_key
from rankloom.errors import FileError
from rankloom.formats.patterns import exactly, fault
from rankloom.formats.peft.pairs import whole_pair
from rankloom.formats.view import View, attention_of
from rankloom.methods.lora import scale_of

Settings = Mapping[str, Any]


def rank_fields(view: View) -> dict[str, Any]:
    """r, lora_alpha, use_rslora, rank_pattern and alpha_pattern that give every place its rank and scale.

    The plan's own wording where it says the same, else the commonest rank and alpha, and exact patterns for the rest.
    """
    method = _settings(view.plan.method)
    scaling = getattr(method, "scaling", "standard")
    wanted = {place_of(site, view): rank_and_scale(site, adapter) for site, adapter in view.adapted}
    plan = view.plan
    if method is not None and not fault(plan.rank_pattern) and not fault(plan.alpha_pattern):
        own = {
            "r": method.r,  # type: ignore[attr-defined]
            "lora_alpha": tidy(method.lora_alpha),  # type: ignore[attr-defined]
            "rank_pattern": dict(plan.rank_pattern),
            "alpha_pattern": {k: tidy(v) for k, v in plan.alpha_pattern.items()},
        }
        if all(_says(own, scaling, name, rank, scale) for name, (rank, scale) in wanted.items()):
            return {**own, "use_rslora": scaling == "rslora"}
    settings = {n: (rank, _alpha(scale, rank, scaling)) for n, (rank, scale) in wanted.items()}
    (r, alpha), _ = Counter(settings.values()).most_common(1)[0]
    return {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": scaling == "rslora",
        "rank_pattern": {exactly(n): rank for n, (rank, _) in settings.items() if rank != r},
        "alpha_pattern": {exactly(n): a for n, (_, a) in settings.items() if a != alpha},
    }


def plan_patterns(
    values: Settings, modules: Mapping[str, nn.Module], names: Sequence[str], where: str
) -> dict[str, Any]:
    """rank_pattern and alpha_pattern of a plan: the config's, after exact ones where our rank or name differs.

    A grouped convolution has 1/groups of PEFT's rank here; an attention's two weights have names of their own.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    places: list[str] = []
    for name in names:
        module = modules.get(name)
        attention = isinstance(module, nn.MultiheadAttention)
        own = [f"{name}.in_proj_weight", f"{name}.out_proj.weight"] if attention else [name]
        places += own
        count = int(getattr(module, "groups", 1)) if isinstance(module, nn.modules.conv._ConvNd) else 1
        if count == 1 and not attention:
            continue
        rank, alpha = _at(values, name)
        if rank % count:
            raise FileError(f"{where}: rank {rank} of {name!r} is no multiple of its {count} groups")
        ranks |= {exactly(place): rank // count for place in own}
        alphas |= {exactly(place): alpha / (math.sqrt(count) if values["use_rslora"] else count) for place in own}
    return {
        "rank_pattern": ranks | hitting(values["rank_pattern"], ranks, places, names, f"{where}: rank_pattern"),
        "alpha_pattern": alphas | hitting(values["alpha_pattern"], alphas, places, names, f"{where}: alpha_pattern"),
    }


def _settings(method: Method) -> Method | None:
    """The method in the chain that has a rank and an alpha."""
    if {"r", "lora_alpha"} <= {field.name for field in dataclasses.fields(method)}:
        return method
    return next((found for inner in method.inner_methods() if (found := _settings(inner)) is not None), None)


def place_of(site: Site, view: View) -> str:
    """The name by which PEFT looks up rank and scale: an attention's for its own weights."""
    return attention_of(site, view.modules) or site.name


def rank_and_scale(site: Site, adapter: Adapter) -> tuple[int, float]:
    """PEFT's rank and scale of one place."""
    pair = whole_pair(adapter)
    return pair.rank * site.groups, pair.scaling


def _says(own: Settings, scaling: str, name: str, rank: int, scale: float) -> bool:
    r, alpha = _at(own, name)
    return r == rank and math.isclose(scale_of(alpha, r, scaling), scale, rel_tol=1e-9)


def _at(values: Settings, name: str) -> tuple[int, float]:
    """Rank and alpha that a config gives to one name."""
    rank, alpha = pattern_key(values["rank_pattern"], name), pattern_key(values["alpha_pattern"], name)
    return (
        values["r"] if rank is None else values["rank_pattern"][rank],
        values["lora_alpha"] if alpha is None else values["alpha_pattern"][alpha],
    )


def _alpha(scale: float, rank: int, scaling: str) -> float:
    return tidy(scale * (math.sqrt(rank) if scaling == "rslora" else rank))


def tidy(value: float) -> float:
    """A whole number as int (PEFT's type), else the float."""
    near = round(value)
    return near if math.isclose(value, near, rel_tol=1e-12) else value


def hitting(
    patterns: Settings, known: Settings, places: Sequence[str], names: Sequence[str], where: str
) -> dict[str, Any]:
    """The patterns that hit one of our places and are not `known` already; a warning for those that hit nothing."""
    kept = {}
    for key, value in patterns.items():
        if not any(pattern_key((key,), name) for name in (*places, *names)):
            warnings.warn(f"{where} names {key!r}, which is no target", stacklevel=7)
        elif key not in known and any(pattern_key((key,), place) for place in places):
            kept[key] = value
    return kept
