"""What is worth a word about a plan before it trains, though nothing is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from rankloom.core.method import Method
from rankloom.core.plan import Plan
from rankloom.settings import settings_of
from rankloom.store.base import Packed

SMALL = 0.2
"""A scale lora_alpha/r below it is worth a word, whoever chose it."""


def plan_notes(plan: Plan, model: nn.Module) -> tuple[str, ...]:
    """Scales that fell with a rank that was raised alone; methods that are made for a store, on a base without."""
    found = []
    for part in dict.fromkeys(_methods(plan.method)):
        found += _scale(part)
        found += _store(part, plan, model)
    return tuple(found)


def _methods(method: Method) -> Iterator[Method]:
    yield method
    for s in settings_of(type(method)):
        value = getattr(method, s.name)
        for inner in value if isinstance(value, tuple) else (value,):
            if isinstance(inner, Method):
                yield from _methods(inner)


def _scale(part: Any) -> list[str]:
    usual = {s.name: s.default for s in settings_of(type(part))}
    if not {"r", "lora_alpha"} <= usual.keys() or getattr(part, "scaling", "standard") != "standard":
        return []
    scale = part.lora_alpha / part.r
    left = part.r > usual["r"] and part.lora_alpha == usual["lora_alpha"]
    if scale >= SMALL and not (left and scale < 1):
        return []
    same = part.r * usual["lora_alpha"] / usual["r"]
    other = ", scaling=rslora divides by √r instead" if "scaling" in usual else ""
    return [
        f"r={part.r} with lora_alpha={part.lora_alpha:g} scales the change by {scale:.3g}: lora_alpha={same:g} keeps "
        f"the scale of r={usual['r']}{other}"
    ]


def _store(part: Method, plan: Plan, model: nn.Module) -> list[str]:
    wanted = getattr(part, "made_for", "")
    packed = plan.store is not None or getattr(model, "is_quantized", False) or any(map(_is_packed, model.modules()))
    return (
        [f"the base stays dense: what {type(part).__name__} is made for is {wanted}"] if wanted and not packed else []
    )


def _is_packed(module: nn.Module) -> bool:
    return any(isinstance(value, Packed) for value in module._parameters.values())
