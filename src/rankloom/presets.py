"""Systems that are only a choice of parts."""

from __future__ import annotations

from typing import Any

from rankloom.core.plan import Plan
from rankloom.methods.asymmetric import AsymmetricLoRA
from rankloom.methods.lora import LoRA
from rankloom.rules.projection import ProjectedGradient


def asymmetric_lora(**settings: Any) -> AsymmetricLoRA:
    """Asymmetric LoRA as published: A orthonormal and frozen, B trained from zero."""
    return AsymmetricLoRA(**settings)


def lora_fa(**settings: Any) -> Plan:
    """LoRA-FA (arXiv 2308.03303): A frozen at its start, B's gradient projected onto the full gradient step."""
    return Plan(LoRA(**{"frozen": "A", **settings}), rules=(ProjectedGradient(),))


def rslora(**settings: Any) -> LoRA:
    """rsLoRA (arXiv 2312.03732): LoRA with the scale lora_alpha/√r."""
    return LoRA(**{"scaling": "rslora", **settings})
