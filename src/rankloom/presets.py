"""Systems that are only a choice of parts."""

from __future__ import annotations

import re
from typing import Any

from rankloom.core.plan import Plan
from rankloom.errors import SettingsError
from rankloom.methods.asymmetric import AsymmetricLoRA
from rankloom.methods.lora import LoRA
from rankloom.rules.projection import ProjectedGradient

_FACTOR_CODES = {"V": "svd", "V_last": "svd_last", "U": "svd", "U_last": "svd_last"}


def asymmetric_lora(code: str = "A_rand_hB_zero", **settings: Any) -> AsymmetricLoRA:
    """Asymmetric LoRA by the authors' code: `h` (hat) before a trained factor, and each factor's start.

    Starts: rand, he, zero, and V, V_last (of A) or U, U_last (of B) for singular vectors of W. The default is the
    published setting: A orthonormal and kept, B trained from zero. Raises `SettingsError` for any other code.
    """
    found = re.fullmatch(r"(h?)A_(rand|he|zero|V|V_last)_(h?)B_(rand|he|zero|U|U_last)", code)
    if found is None:
        raise SettingsError(f"asymmetric_lora: {code!r} is no code such as 'A_rand_hB_zero' or 'hA_zero_B_U'")
    hat_a, start_a, hat_b, start_b = found.groups()
    starts: dict[str, Any] = {
        "init_A": _FACTOR_CODES.get(start_a, start_a),
        "init_B": _FACTOR_CODES.get(start_b, start_b),
    }
    return AsymmetricLoRA(**{**starts, "update_A": bool(hat_a), "update_B": bool(hat_b), **settings})


def lora_fa(**settings: Any) -> Plan:
    """LoRA-FA (arXiv 2308.03303): A frozen at its start, B's gradient projected onto the full gradient step."""
    return Plan(LoRA(**{"frozen": "A", **settings}), rules=(ProjectedGradient(),))


def rslora(**settings: Any) -> LoRA:
    """rsLoRA (arXiv 2312.03732): LoRA with the scale lora_alpha/√r."""
    return LoRA(**{"scaling": "rslora", **settings})
