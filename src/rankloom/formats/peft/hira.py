"""PEFT's HIRA: a factor pair whose product multiplies the weight."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from torch import nn

from rankloom.core.method import Method
from rankloom.formats.entry import Entry, mapped
from rankloom.formats.peft import fields as f
from rankloom.formats.peft.layout import factors
from rankloom.formats.peft.paths import Paths
from rankloom.formats.peft.translator import Translator
from rankloom.formats.view import View
from rankloom.methods.hira import HiRA, HiRAAdapter

KEYS = {
    "lora_A.weight": "hira_A",
    "lora_B.weight": "hira_B",
    "lora_embedding_A": "hira_embedding_A",
    "lora_embedding_B": "hira_embedding_B",
}
"""LORA's names of a factor, of the same shape, and HIRA's."""


class Hira(Translator):
    """`HIRA`."""

    peft_type = "HIRA"
    leaves = (HiRAAdapter,)
    kinds = frozenset({"linear", "conv1d_transposed", "embedding", "conv1d", "conv2d", "conv3d"})
    own_suffixes = tuple(KEYS.values())
    fields = {
        **f.TARGETED,
        "fan_in_fan_out": f.FLAG,
        "r": f.positive(32),
        "hira_dropout": f.PROBABILITY,
        "init_weights": f.Field(bool | Literal["gaussian"], True),
        "rank_pattern": f.Field(Annotated[Mapping[str, f.Whole], f.SIMPLE], {}),
    }

    def site_problems(self, view: View) -> list[str]:
        if not isinstance(view.plan.method, HiRA):
            return [f"PEFT's HIRA has no {type(view.plan.method).__name__} around it"]
        found = [
            f"PEFT's HIRA has no grouped convolutions ({site.name})" for site, _ in view.adapted if site.groups > 1
        ]
        if view.plan.rank_pattern:
            found.append("PEFT's HIRA (0.21) does not follow rank_pattern")
        return found

    def site_entries(self, view: View, paths: Paths) -> list[Entry]:
        return [
            mapped(f"{paths.site(site)}.{KEYS[part.key]}", adapter.get_parameter(part.ours), part.out, part.back)
            for site, adapter in view.adapted
            for part in factors(site)
        ]

    def method_fields(self, view: View) -> dict[str, Any]:
        method = view.plan.method
        assert isinstance(method, HiRA)
        start: bool | str = "gaussian" if method.init_weights == "gaussian" else True
        return {"r": method.r, "hira_dropout": method.hira_dropout, "init_weights": start}

    def method(self, values: Mapping[str, Any], where: str) -> Method:
        start: Any = "gaussian" if values["init_weights"] == "gaussian" else "kaiming"
        return HiRA(values["r"], float(values["hira_dropout"]), start)

    def site_patterns(
        self, values: Mapping[str, Any], modules: Mapping[str, nn.Module], names: Sequence[str], where: str
    ) -> dict[str, Any]:
        """None: PEFT (0.21) gives every layer the rank r, whatever the pattern says."""
        if values["rank_pattern"]:
            warnings.warn(f"{where}: PEFT's HIRA does not follow rank_pattern; r is every layer's", stacklevel=6)
        return {}
