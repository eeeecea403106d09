"""PEFT's IA3: a vector for the output of a layer, or for the input of those called feed-forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.method import Method
from rankloom.core.plan import Plan
from rankloom.core.site import Site
from rankloom.core.targets import matches
from rankloom.formats.entry import Entry, mapped
from rankloom.formats.manifest import Source
from rankloom.formats.patterns import alternatives, check_expressions, fault
from rankloom.formats.peft import fields as f
from rankloom.formats.peft.paths import Paths
from rankloom.formats.peft.targets import target_fields
from rankloom.formats.peft.translator import Translator
from rankloom.formats.view import View
from rankloom.methods.ia3 import CONVS, IA3, IA3Adapter

Words = str | Iterable[str] | None


class Ia3(Translator):
    """`IA3`."""

    peft_type = "IA3"
    leaves = (IA3Adapter,)
    kinds = frozenset({"linear", "conv1d_transposed", "conv2d", "conv3d"})
    own_suffixes = ("ia3_l",)
    fields = {
        "peft_type": f.Field(str),
        "target_modules": f.NAMES,
        "exclude_modules": f.NAMES,
        "modules_to_save": f.LIST,
        "fan_in_fan_out": f.FLAG,
        "feedforward_modules": f.NAMES,
        "init_ia3_weights": f.Field(bool, True),
    }

    def site_problems(self, view: View) -> list[str]:
        if not isinstance(view.plan.method, IA3):
            return [f"PEFT's IA3 has no {type(view.plan.method).__name__} around it"]
        return []

    def site_entries(self, view: View, paths: Paths) -> list[Entry]:
        return [_entry(f"{paths.site(site)}.ia3_l", site, adapter) for site, adapter in view.adapted]

    def method_fields(self, view: View) -> dict[str, Any]:
        """A list where it means the same and is part of target_modules, as PEFT demands; else one expression."""
        ours = {site.name for site, adapter in view.adapted if getattr(adapter, "feedforward", False)}
        names = [site.name for site, _ in view.adapted]
        targets = target_fields(view, self.fields, expressions=True)["target_modules"]
        method = view.plan.method
        assert isinstance(method, IA3)
        said = method.feedforward_modules
        words: Any = said if isinstance(said, str) else sorted(said)
        fits = isinstance(words, str) or isinstance(targets, str) or set(words) <= set(targets)
        if not fits or (isinstance(words, str) and fault([words])) or _hit(words, names) != ours:
            words = alternatives(sorted(ours))
        return {"feedforward_modules": words}

    def method(self, values: Mapping[str, Any], where: str) -> Method:
        words = values["feedforward_modules"] or ()
        check_expressions("feedforward_modules", [words] if isinstance(words, str) else (), where)
        return IA3(words if isinstance(words, str) else tuple(words))

    def plans(self, source: Source, model: nn.Module) -> tuple[Plan, Plan]:
        """With the layers that PEFT's rule means by feedforward_modules, where ours means others by the same words."""
        plan, kept = super().plans(source, model)
        assert isinstance(kept.method, IA3)
        said = kept.method.feedforward_modules
        meant = _hit(said, plan.sites)
        found = [{name for name in plan.sites if matches(words, name)} for words in _each(said)]
        if all(found) and set().union(*found) == meant:
            return plan, kept
        method = IA3(tuple(sorted(meant)))
        return dataclasses.replace(plan, method=method), dataclasses.replace(kept, method=method)


def _hit(words: Words, names: Iterable[str]) -> set[str]:
    """The names that PEFT takes for feed-forward layers: ends of names, dot or no dot, or one expression."""
    if isinstance(words, str):
        return {name for name in names if matches(words, name)}
    ends = tuple(words or ())
    return {name for name in names if name.endswith(ends)}


def _each(words: str | tuple[str, ...]) -> list[str | tuple[str, ...]]:
    return [words] if isinstance(words, str) else [(word,) for word in words]


def _entry(key: str, site: Site, adapter: Adapter) -> Entry:
    vector = adapter.get_parameter("vector")
    size = vector.numel()
    ones = (1,) * (len(site.weight_shape) - 2)
    row = getattr(adapter, "feedforward", False) or site.kind.name in CONVS
    shape = (1, size, *ones) if row else (size, 1)

    def out(tensor: Tensor) -> Tensor:
        return tensor.reshape(shape)

    return mapped(key, vector, out, lambda tensor: tensor.reshape(size))
