"""PEFT's formats: one translator for each `peft_type`, both ways."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rankloom.core.adapter import Adapter
from rankloom.errors import suggest
from rankloom.formats.peft.adalora import Adalora
from rankloom.formats.peft.hira import Hira
from rankloom.formats.peft.ia3 import Ia3
from rankloom.formats.peft.lora import Lora
from rankloom.formats.peft.lycoris import Loha, Lokr
from rankloom.formats.peft.translator import Translator
from rankloom.formats.peft.vera import Vera
from rankloom.formats.view import View

TRANSLATORS: Mapping[str, Translator] = {
    t.peft_type: t for t in (Adalora(), Hira(), Ia3(), Loha(), Lokr(), Lora(), Vera())
}

PROMPTS = frozenset(
    {"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING"}
)
"""Types of PEFT that change no weight."""
OTHERS = frozenset(
    {"ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HRA", "LILY"}
    | {"LN_TUNING", "MISS", "OFT", "OSF", "PEANUT", "POLY", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHADOW", "SHIRA"}
    | {"SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "WAVEFT", "XLORA"}
)
"""Types of PEFT that no translator reads."""


def unread(said: str, known: Iterable[str]) -> str:
    """Why a `peft_type` cannot be read, and what to do instead."""
    if said in PROMPTS:
        return "is a method of PEFT that changes no weight; use it with PEFT"
    if said in OTHERS:
        return "is a method of PEFT that Rankloom does not read; merge it there, or save_as_lora it where PEFT can"
    return f"cannot be read{suggest(said, known)}"


def translator_for(view: View) -> tuple[Translator | None, list[str]]:
    """The translator whose adapters are at the bottom of every place, and what keeps PEFT from holding this adapter."""
    for translator in TRANSLATORS.values():
        if view.adapted and all(_rests_on(adapter, translator) for _, adapter in view.adapted):
            return translator, translator.problems(view)
    method = type(view.plan.method).__name__
    return None, [f"PEFT has no {method}" if view.adapted else "PEFT needs at least one adapted layer"]


def _rests_on(adapter: Adapter, translator: Translator) -> bool:
    return any(type(module) in translator.leaves for module in adapter.modules())
