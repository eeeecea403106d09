"""PEFT's formats: one translator for each `peft_type`, both ways."""

from __future__ import annotations

from collections.abc import Mapping

from rankloom.core.adapter import Adapter
from rankloom.formats.peft.adalora import Adalora
from rankloom.formats.peft.lora import Lora
from rankloom.formats.peft.translator import Translator
from rankloom.formats.peft.vera import Vera
from rankloom.formats.view import View

TRANSLATORS: Mapping[str, Translator] = {t.peft_type: t for t in (Adalora(), Lora(), Vera())}


def translator_for(view: View) -> tuple[Translator | None, list[str]]:
    """The translator whose adapters are at the bottom of every place, and what keeps PEFT from holding this adapter."""
    for translator in TRANSLATORS.values():
        if view.adapted and all(_rests_on(adapter, translator) for _, adapter in view.adapted):
            return translator, translator.problems(view)
    method = type(view.plan.method).__name__
    return None, [f"PEFT has no {method}" if view.adapted else "PEFT needs at least one adapted layer"]


def _rests_on(adapter: Adapter, translator: Translator) -> bool:
    return any(type(module) in translator.leaves for module in adapter.modules())
