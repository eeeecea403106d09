"""PEFT's VERA: two vectors for each layer, and one frozen pair for the whole model, in the file or known by its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from rankloom.core.method import Method
from rankloom.formats.entry import Entry, plain
from rankloom.formats.peft import fields as f
from rankloom.formats.peft.beside import own_entries
from rankloom.formats.peft.paths import Paths
from rankloom.formats.peft.translator import Translator
from rankloom.formats.view import View
from rankloom.methods.vera import VeRA, VeRAAdapter

BIAS_OUT = {"lora_only": "vera_only"}
SHARED = ("vera_A", "vera_B")


class Vera(Translator):
    """`VERA`."""

    peft_type = "VERA"
    leaves = (VeRAAdapter,)
    kinds = frozenset({"linear", "conv1d_transposed"})
    own_suffixes = ("vera_lambda_b", "vera_lambda_d")
    fields = {
        **{key: field for key, field in f.COMMON.items() if key != "exclude_modules"},
        "bias": f.Field(Literal["none", "all", "vera_only"], "none"),
        "r": f.positive(256),
        "projection_prng_key": f.Field(int, 0),
        "save_projection": f.Field(bool, True),
        "vera_dropout": f.PROBABILITY,
        "d_initial": f.Field(float, 0.1),
        "init_weights": f.Field(bool, True),
    }

    def site_problems(self, view: View) -> list[str]:
        if not isinstance(view.plan.method, VeRA):
            return [f"PEFT's VERA has no {type(view.plan.method).__name__} around it"]
        return []

    def site_entries(self, view: View, paths: Paths) -> list[Entry]:
        own = [e for site, adapter in view.adapted for e in own_entries(adapter, paths.site(site))]
        if not _method(view).save_projection:
            return own
        shared = view.shared
        return [*own, *(plain(f"base_model.{key}", shared.tensor(key)) for key in SHARED)]

    def method_fields(self, view: View) -> dict[str, Any]:
        method = _method(view)
        names = ("r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial")
        return {name: getattr(method, name) for name in names}

    def method(self, values: Mapping[str, Any], where: str) -> Method:
        same = ("r", "projection_prng_key", "save_projection")
        settings: dict[str, Any] = {k: values[k] for k in same}
        return VeRA(**settings, vera_dropout=float(values["vera_dropout"]), d_initial=float(values["d_initial"]))

    def bias_out(self, bias: str) -> str:
        return BIAS_OUT.get(bias, bias)

    def bias_in(self, bias: str) -> str:
        return {v: k for k, v in BIAS_OUT.items()}.get(bias, bias)


def _method(view: View) -> VeRA:
    assert isinstance(view.plan.method, VeRA)
    return view.plan.method
