"""A translator: one of PEFT's types both ways, config and keys; here what they all have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from rankloom.core.adapter import Adapter
from rankloom.core.method import Method
from rankloom.core.plan import Plan
from rankloom.core.replicate import replicate
from rankloom.core.targets import base_modules
from rankloom.formats.entry import Entry
from rankloom.formats.manifest import Source
from rankloom.formats.peft.beside import about, token_entries, whole_entries
from rankloom.formats.peft.fields import Field, filled, read_fields
from rankloom.formats.peft.paths import Paths
from rankloom.formats.peft.reading import exact, excluded, places, saved_modules, tuples, with_ties
from rankloom.formats.peft.rewriting import model_problems, rewritten
from rankloom.formats.peft.targets import blocks, saved_wording, target_fields
from rankloom.formats.view import View


class Translator(ABC):
    """One `peft_type`: its fields, the adapters that it holds, and the map between their tensors and PEFT's keys."""

    peft_type: ClassVar[str]
    leaves: ClassVar[tuple[type[Adapter], ...]]
    kinds: ClassVar[frozenset[str]]
    fields: ClassVar[Mapping[str, Field]]
    own_suffixes: ClassVar[tuple[str, ...]]
    """Ends of the keys that mark an adapted module."""

    def problems(self, view: View) -> list[str]:
        """Why PEFT cannot hold this adapter; empty if it can."""
        return [*self._shared_problems(view), *dict.fromkeys(self.site_problems(view))]

    @abstractmethod
    def site_problems(self, view: View) -> list[str]:
        """Reasons that lie in the adapters themselves."""

    @abstractmethod
    def method_fields(self, view: View) -> dict[str, Any]:
        """The config fields that the method owns."""

    @abstractmethod
    def site_entries(self, view: View, paths: Paths) -> list[Entry]:
        """The tensors of the adapted places."""

    def config(self, view: View) -> dict[str, Any]:
        """The whole adapter_config.json: defaults left out, but for what vLLM demands (r, lora_alpha)."""
        plan = view.plan
        tokens = plan.trainable_token_indices
        replicated = [list(pair) for pair in plan.layer_replication]
        values: dict[str, Any] = {
            **target_fields(view, self.fields, expressions=not rewritten(view.model, self.peft_type)),
            "modules_to_save": saved_wording(view) or None,
            "bias": self.bias_out(plan.bias),
            "trainable_token_indices": _jsonable(tokens) or None,
            "layer_replication": replicated or None,
            "fan_in_fan_out": any(f.kind.name == "conv1d_transposed" for f, _ in view.adapted),
            **self.method_fields(view),
        }
        always = {"peft_type": self.peft_type, "target_modules": values.pop("target_modules")}
        required: dict[str, Any] = {k: values.pop(k) for k in ("r", "lora_alpha", "total_step") if k in values}
        kept = {k: v for k, v in values.items() if k in self.fields and v != self.fields[k].default}
        everything: dict[str, Any] = {**always, **required, **kept, **about(view.model)}
        return dict(sorted(everything.items()))

    def entries(self, view: View) -> list[Entry]:
        """Every tensor of the file."""
        paths = Paths(view)
        return [*self.site_entries(view, paths), *self.other_entries(view, paths)]

    def other_entries(self, view: View, paths: Paths) -> list[Entry]:
        """The tensors trained whole, and the token rows."""
        return [*whole_entries(view, paths), *token_entries(view, paths)]

    def notes(self, view: View) -> list[str]:
        """What the file says otherwise than the plan, in words."""
        return []

    def bias_out(self, bias: str) -> str:
        """Our bias setting in PEFT's words."""
        return bias

    def _shared_problems(self, view: View) -> list[str]:
        plan = view.plan
        found = [
            f"{setting} does not go with {self.peft_type}"
            for setting in ("trainable_token_indices", "layer_replication")
            if getattr(plan, setting) and setting not in self.fields
        ]
        if plan.bias != "none" and "bias" not in self.fields:
            found.append(f"bias={plan.bias!r} does not go with {self.peft_type}")
        if plan.start is not None:
            found.append(f"its base is made by {plan.start}, and PEFT would lay it on another")
        places = {(id(f.layer), f.slot) for f, _ in view.adapted}
        if any((id(f.layer), f.slot) in places for f, _ in view.tokens):
            found.append("trained token rows and an adapter on the same layer")
        for site, _ in view.adapted:
            if site.kind.name not in self.kinds:
                found.append(f"{self.peft_type} does not reach {site.kind.name} sites ({site.name})")
        found += model_problems(view, self.peft_type)
        if saved_wording(view) is None:
            found.append("PEFT reads modules_to_save as any ending of a name, and no wording means ours only")
        return list(dict.fromkeys(found))

    @abstractmethod
    def method(self, values: Mapping[str, Any], where: str) -> Method:
        """The method that the fields describe."""

    def site_patterns(
        self, values: Mapping[str, Any], modules: Mapping[str, nn.Module], names: Sequence[str], where: str
    ) -> dict[str, Any]:
        """`rank_pattern` and `alpha_pattern` of the plan."""
        return {}

    def entries_in(self, view: View, source: Source) -> list[Entry]:
        """Every tensor that the file must have."""
        return self.entries(view)

    def prepare(self, view: View, source: Source) -> None:
        """Change freshly attached adapters to the shapes of the file (pruned ranks)."""
        return

    def bias_in(self, bias: str) -> str:
        """PEFT's bias setting in our words."""
        return bias

    def plans(self, source: Source, model: nn.Module) -> tuple[Plan, Plan]:
        """(plan to attach with, plan to keep). The first names exactly the places whose tensors the file has.

        `model` is a copy that may be changed. Raises `FileError` where config, tensors and model disagree on
        the places.
        """
        values = read_fields(source.config, self.fields, source.config_file, source.ignore)
        values = with_ties(values, dict(base_modules(model)))
        ranges = tuples(values.get("layer_replication") or ())
        layers, parameters = self.places(source, model)
        modules = dict(base_modules(model))
        bias: Any = self.bias_in(values.get("bias", "none"))
        kept = Plan(
            self.method(values, source.config_file),
            target_modules=tuples(values["target_modules"] or ()),
            exclude_modules=excluded(values.get("exclude_modules"), modules),
            target_parameters=tuple(values.get("target_parameters") or ()),
            layers_to_transform=blocks(values.get("layers_to_transform")),
            layers_pattern=tuples(values.get("layers_pattern")),
            modules_to_save=saved_modules(values["modules_to_save"], source, modules),
            trainable_token_indices=tuples(values.get("trainable_token_indices") or ()),
            bias=bias,
            layer_replication=ranges,
            **self.site_patterns(values, modules, [*layers, *parameters], source.config_file),
        )
        return exact(kept, layers, parameters), kept

    def places(self, source: Source, model: nn.Module) -> tuple[list[str], list[str]]:
        """Names of the layers and bare parameters that the file's tensors belong to."""
        values = filled(source.config, self.fields)
        ranges = tuples(values.get("layer_replication") or ())
        undo = replicate(model, ranges) if ranges else None
        try:
            modules = dict(base_modules(model))
            return places(source, with_ties(values, modules), modules, self.own_suffixes)
        finally:
            if undo is not None:
                undo()


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: list(v) for k, v in value.items()}
    return list(value)
