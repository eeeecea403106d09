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
    "BiLoRA": "rankloom.methods.bilora",
    "Blend": "rankloom.methods.blend",
    "DoRA": "rankloom.methods.dora",
    "DyLoRA": "rankloom.methods.dylora",
    "Gate": "rankloom.core.gate",
    "HiRA": "rankloom.methods.hira",
    "IA3": "rankloom.methods.ia3",
    "LoHa": "rankloom.methods.loha",
    "LoKr": "rankloom.methods.lokr",
    "LoRA": "rankloom.methods.lora",
    "LoRAHub": "rankloom.compose.lorahub",
    "LoRAPlus": "rankloom.rules.loraplus",
    "MELoRA": "rankloom.methods.melora",
    "Method": "rankloom.core.method",
    "MixedBits": "rankloom.store.mixed",
    "Mixture": "rankloom.methods.mixture",
    "MoV": "rankloom.methods.mov",
    "NOLA": "rankloom.methods.nola",
    "NormalFloat": "rankloom.store.normalfloat",
    "Plan": "rankloom.core.plan",
    "QALoRA": "rankloom.methods.qalora",
    "RankloomError": "rankloom.errors",
    "ReLoRA": "rankloom.rules.relora",
    "Rule": "rankloom.core.rule",
    "Slices": "rankloom.methods.slices",
    "TiedLoRA": "rankloom.methods.tied",
    "TopK": "rankloom.gates.topk",
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
    "list_methods": "rankloom.systems",
    "list_systems": "rankloom.systems",
    "llava_mole": "rankloom.presets",
    "load": "rankloom.formats",
    "loftq": "rankloom.presets",
    "lora_fa": "rankloom.presets",
    "lora_flow": "rankloom.presets",
    "loramoe": "rankloom.presets",
    "lq_lora": "rankloom.presets",
    "lqer": "rankloom.presets",
    "moelora_task": "rankloom.presets",
    "molora": "rankloom.presets",
    "qdylora": "rankloom.presets",
    "qlora": "rankloom.presets",
    "register": "rankloom.registry",
    "relora": "rankloom.presets",
    "rslora": "rankloom.presets",
    "save": "rankloom.formats",
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
