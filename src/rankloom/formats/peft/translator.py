"""What all PEFT types have in common, both ways: tensors trained whole, token rows, targets, the plan around a method."""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from rankloom.core.adapter import Adapter
from rankloom.core.method import Method
from rankloom.core.plan import Plan
from rankloom.core.replicate import replicate
from rankloom.core.targets import base_modules
from rankloom.core.whole import tokens_key
from rankloom.errors import FileError, suggest
from rankloom.formats.entry import Entry, plain
from rankloom.formats.manifest import Source
from rankloom.formats.patterns import alternatives, simple
from rankloom.formats.peft.fields import Field, read_fields
from rankloom.formats.peft.paths import Paths, strip
from rankloom.formats.peft.targets import selected, selected_parameters, target_fields
from rankloom.formats.view import View, attention_of

TOKENS = ".token_adapter.trainable_tokens_delta"
AUTOMATIC = {"classifier", "score", "qa_outputs"}
"""Heads that PEFT lists in modules_to_save by itself, whether the model has them or not."""


class Translator(ABC):
    """One `peft_type`: its fields, the adapters that it holds, and the map between their tensors and PEFT's keys."""

    peft_type: ClassVar[str]
    leaves: ClassVar[tuple[type[Adapter], ...]]
    kinds: ClassVar[frozenset[str]]
    fields: ClassVar[Mapping[str, Field]]
    own_suffixes: ClassVar[tuple[str, ...]]
    """Ends of the keys that mark an adapted module."""

    # ---- writing ----------------------------------------------------------------------------------------------------

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
            **target_fields(view),
            "modules_to_save": sorted(plan.modules_to_save) or None,
            "bias": self.bias_out(plan.bias),
            "trainable_token_indices": _jsonable(tokens) or None,
            "layer_replication": replicated or None,
            "fan_in_fan_out": any(f.place.kind.name == "conv1d_transposed" for f, _ in view.adapted),
            **self.method_fields(view),
        }
        always = {"peft_type": self.peft_type, "target_modules": values.pop("target_modules")}
        required = {k: values.pop(k) for k in ("r", "lora_alpha", "total_step") if k in values}
        kept = {k: v for k, v in values.items() if k in self.fields and v != self.fields[k].default}
        return dict(sorted({**always, **required, **kept, **_about(view.model)}.items()))

    def entries(self, view: View) -> list[Entry]:
        """Every tensor of the file."""
        paths = Paths(view)
        return [*self.site_entries(view, paths), *self.other_entries(view, paths)]

    def other_entries(self, view: View, paths: Paths) -> list[Entry]:
        """The tensors trained whole, and the token rows."""
        return [*_whole(view, paths), *_tokens(view, paths)]

    def notes(self, view: View) -> list[str]:
        """What the file says otherwise than the plan, in words."""
        return []

    def bias_out(self, bias: str) -> str:
        """Our bias setting in PEFT's words."""
        return bias

    def _shared_problems(self, view: View) -> list[str]:
        plan, modules = view.plan, view.modules
        found = [
            f"{setting} does not go with {self.peft_type}"
            for setting in ("trainable_token_indices", "layer_replication")
            if getattr(plan, setting) and setting not in self.fields
        ]
        places = {(id(f.place.layer), f.place.slot) for f, _ in view.adapted}
        if any((id(f.place.layer), f.place.slot) in places for f, _ in view.tokens):
            found.append("trained token rows and an adapter on the same layer")
        attention: dict[str, list[str]] = {}
        for fitted, _ in view.adapted:
            if fitted.place.kind.name not in self.kinds:
                found.append(f"{self.peft_type} does not reach {fitted.place.kind.name} sites ({fitted.site.name})")
            owner = attention_of(fitted, modules)
            if owner is not None:
                attention.setdefault(owner, []).append(fitted.place.slot)
        if any(sorted(slots) != ["in_proj_weight", "weight"] for slots in attention.values()):
            found.append(
                "PEFT adapts in_proj and out_proj of a MultiheadAttention together, and no other weights of it"
            )
        if attention and plan.bias != "none":
            found.append("bias beside an adapted MultiheadAttention")
        return list(dict.fromkeys(found))

    # ---- reading ----------------------------------------------------------------------------------------------------

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
        return None

    def bias_in(self, bias: str) -> str:
        """PEFT's bias setting in our words."""
        return bias

    def plans(self, source: Source, model: nn.Module) -> tuple[Plan, Plan]:
        """(plan to attach with, plan to keep). The first names exactly the places whose tensors the file has.

        `model` is a copy that may be changed. No regular expression of the file runs unless it is a simple one. Raises
        `FileError` where config, tensors and model disagree on the places.
        """
        values = read_fields(source.config, self.fields, source.config_file)
        ranges = _tuples(values.get("layer_replication") or ())
        layers, parameters = self.places(source, model)
        modules = dict(base_modules(model))
        bias: Any = self.bias_in(values["bias"])
        kept = Plan(
            self.method(values, source.config_file),
            target_modules=_tuples(values["target_modules"] or ()),
            exclude_modules=_tuples(values.get("exclude_modules") or ()),
            target_parameters=tuple(values.get("target_parameters") or ()),
            layers_to_transform=_blocks(values["layers_to_transform"]),
            layers_pattern=_tuples(values["layers_pattern"]),
            modules_to_save=_present(values["modules_to_save"], source, modules),
            trainable_token_indices=_tuples(values.get("trainable_token_indices") or ()),
            bias=bias,
            layer_replication=ranges,
            **self.site_patterns(values, modules, [*layers, *parameters], source.config_file),
        )
        return exact(kept, layers, parameters), kept

    def places(self, source: Source, model: nn.Module) -> tuple[list[str], list[str]]:
        """Names of the layers and bare parameters that the file's tensors belong to."""
        values = {**{k: f.default for k, f in self.fields.items()}, **source.config}
        ranges = _tuples(values.get("layer_replication") or ())
        undo = replicate(model, ranges) if ranges else None
        try:
            return self._places(source, values, dict(base_modules(model)))
        finally:
            if undo is not None:
                undo()

    def _places(
        self, source: Source, values: Mapping[str, Any], modules: Mapping[str, nn.Module]
    ) -> tuple[list[str], list[str]]:
        owners: dict[str, str] = {}
        for key in source.header:
            suffix = next((s for s in self.own_suffixes if key.endswith(f".{s}")), None)
            if suffix is not None:
                owners.setdefault(strip(key.removesuffix(f".{suffix}")), key)
        wanted = values.get("target_parameters") or ()
        layers: list[str] = []
        parameters: list[str] = []
        for owner, key in owners.items():
            if owner not in modules:
                raise _wrong_base(source, key, owner, modules)
            own = [f"{owner}.{p}" for p, v in modules[owner]._parameters.items() if v is not None]
            hit = sorted(selected_parameters(wanted, own))
            parameters += hit
            if not hit:
                layers.append(owner)
        inside = {f"{n}.out_proj" for n in layers if isinstance(modules[n], nn.MultiheadAttention)}
        layers = [n for n in layers if n not in inside]
        self._agree(source, values, modules, layers)
        return layers, parameters

    def _agree(
        self, source: Source, values: Mapping[str, Any], modules: Mapping[str, nn.Module], layers: list[str]
    ) -> None:
        """The config's targets and the file's tensors name the same modules, where the config's wording may be run."""
        target = values["target_modules"]
        wordings = [v for v in (target, values.get("exclude_modules")) if isinstance(v, str)]
        if target is None or target == "all-linear" or not all(map(simple, wordings)):
            return
        meant = selected(values, modules)
        for name in sorted(meant - set(layers)):
            raise FileError(
                f"{source.weights_file}: no tensor for {name!r}, which target_modules={target!r} of "
                f"{source.config_file} names; the file is incomplete"
            )
        for name in sorted(set(layers) - meant):
            raise FileError(
                f"{source.weights_file}: has tensors for {name!r}, which target_modules={target!r} of "
                f"{source.config_file} does not name; config and weights do not belong together"
            )


def exact(plan: Plan, layers: Sequence[str], parameters: Sequence[str]) -> Plan:
    """`plan` aimed at exactly these layers and parameters."""
    return dataclasses.replace(
        plan,
        target_modules=alternatives(list(layers)) if layers else (),
        exclude_modules=(),
        layers_to_transform=None,
        layers_pattern=None,
        target_parameters=tuple(parameters),
    )


def own_entries(adapter: Adapter, stem: str) -> list[Entry]:
    """The adapter's parameters under their PEFT names, as they are."""
    named = dict(adapter.named_parameters(recurse=False))
    return [plain(f"{stem}.{suffix}", named[path]) for path, suffix in adapter.peft_names.items() if path in named]


def _whole(view: View, paths: Paths) -> list[Entry]:
    found = []
    for fitted, adapter in view.whole:
        path, slot = fitted.place.path, fitted.place.slot
        stem = paths.module(path) if view.saved_whole(path) else paths.inner(path)
        found.append(plain(f"{stem}.{slot}", adapter.value))
    return found


def _tokens(view: View, paths: Paths) -> list[Entry]:
    shared = view.bank.shared_of(view.name)
    rows = {f.place.path: shared.tensor(tokens_key(f.place.path)) for f, adapter in view.tokens if adapter.lookup}
    return [plain(paths.module(path) + TOKENS, tensor) for path, tensor in rows.items()]


def _about(model: nn.Module) -> dict[str, Any]:
    """What PEFT's config says of the base model, where the model says it."""
    from rankloom.formats.base import base_name

    about: dict[str, Any] = {}
    name = base_name(model)
    if name:
        about["base_model_name_or_path"] = name
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        about["task_type"] = "CAUSAL_LM"
    return about


def _present(names: Sequence[str] | None, source: Source, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """modules_to_save that the model has; PEFT lists heads that it may not have."""
    kept: list[str] = []
    absent: list[str] = []
    for name in names or ():
        there = any(n == name or n.endswith(f".{name}") for n in modules)
        (kept if there else absent).append(name)
    for name in absent:
        if any(f".{name}." in f".{strip(key)}." for key in source.header):
            known = {n.rsplit(".", 1)[-1] for n in modules if n}
            raise FileError(
                f"{source.config_file}: modules_to_save names {name!r}, which this model has not{suggest(name, known)}"
            )
        if name not in AUTOMATIC:
            warnings.warn(
                f"{source.config_file}: modules_to_save names {name!r}; neither the file nor the model has it",
                stacklevel=6,
            )
    return tuple(kept)


def _wrong_base(source: Source, key: str, owner: str, modules: Mapping[str, nn.Module]) -> FileError:
    said = source.config.get("base_model_name_or_path")
    base = f"; the adapter was made for {said!r}" if said else ""
    return FileError(
        f"{source.weights_file}: tensor {key!r} belongs to a module {owner!r}, which this model has not"
        f"{suggest(owner, [n for n in modules if n], n=2)}. Is it the right base model{base}?"
    )


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(v) for v in value)
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return value


def _blocks(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    return (value,) if isinstance(value, int) else tuple(value)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: list(v) for k, v in value.items()}
    return list(value)
