"""Rankloom: every low-rank adaptation method in one place, composable and PEFT-compatible.

Importing this costs torch and nothing more; every public name is loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AdaLoRA": "rankloom.methods.adalora",
    "AsymmetricLoRA": "rankloom.methods.asymmetric",
    "Bank": "rankloom.core.bank",
    "Blend": "rankloom.methods.blend",
    "DoRA": "rankloom.methods.dora",
    "DyLoRA": "rankloom.methods.dylora",
    "LoRA": "rankloom.methods.lora",
    "LoRAPlus": "rankloom.rules.loraplus",
    "Method": "rankloom.core.method",
    "MixedBits": "rankloom.store.mixed",
    "Mixture": "rankloom.methods.mixture",
    "NormalFloat": "rankloom.store.normalfloat",
    "Plan": "rankloom.core.plan",
    "QALoRA": "rankloom.methods.qalora",
    "RankloomError": "rankloom.errors",
    "Rule": "rankloom.core.rule",
    "Slices": "rankloom.methods.slices",
    "Uniform": "rankloom.store.uniform",
    "UnrolledLoRA": "rankloom.methods.unrolled",
    "VeRA": "rankloom.methods.vera",
    "asymmetric_lora": "rankloom.presets",
    "attach": "rankloom.core.attach",
    "combine": "rankloom.compose.arithmetic",
    "detach": "rankloom.core.attach",
    "export": "rankloom.formats",
    "fit": "rankloom.train.fit",
    "hydralora": "rankloom.presets",
    "inspect": "rankloom.formats",
    "load": "rankloom.formats",
    "llava_mole": "rankloom.presets",
    "loftq": "rankloom.presets",
    "lora_fa": "rankloom.presets",
    "lora_flow": "rankloom.presets",
    "loramoe": "rankloom.presets",
    "lq_lora": "rankloom.presets",
    "lqer": "rankloom.presets",
    "methods": "rankloom.systems",
    "moelora_task": "rankloom.presets",
    "molora": "rankloom.presets",
    "qdylora": "rankloom.presets",
    "qlora": "rankloom.presets",
    "register": "rankloom.registry",
    "rslora": "rankloom.presets",
    "save": "rankloom.formats",
    "systems": "rankloom.systems",
    "xlora": "rankloom.presets",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name == "testing":
        return importlib.import_module("rankloom.testing")
    if name not in _PUBLIC:
        from rankloom.errors import suggest

        raise AttributeError(f"module 'rankloom' has no attribute {name!r}{suggest(name, _PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
