"""Reading a PEFT config against its tensors and a model: which places it adapts, and what names mean there."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from rankloom.core.plan import PATTERNS, Plan
from rankloom.core.targets import matches
from rankloom.errors import FileError, suggest
from rankloom.formats.manifest import Source
from rankloom.formats.patterns import check_expressions
from rankloom.formats.peft.paths import strip
from rankloom.formats.peft.targets import ends_with, selected, selected_parameters

Values = Mapping[str, Any]
Modules = Mapping[str, nn.Module]
AUTOMATIC = {"classifier", "score", "qa_outputs"}
"""Heads that PEFT lists in modules_to_save by itself, whether the model has them or not."""

TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields that choose modules."""


def places(source: Source, values: Values, modules: Modules, suffixes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the layers and bare parameters that the file's tensors belong to.

    Raises `FileError` for a module that the model has not, and where config and tensors name different modules.
    """
    wanted = values.get("target_parameters") or ()
    layers: list[str] = []
    parameters: list[str] = []
    for owner, key in _owners(source, suffixes, modules).items():
        if owner not in modules:
            raise _wrong_base(source, key, owner, modules)
        own = [f"{owner}.{p}" for p, v in modules[owner]._parameters.items() if v is not None]
        hit = sorted(selected_parameters(wanted, own))
        parameters += hit
        if not hit:
            layers.append(owner)
    inside = {f"{n}.out_proj" for n in layers if isinstance(modules[n], nn.MultiheadAttention)}
    layers = [n for n in layers if n not in inside]
    _agree(source, values, modules, set(layers))
    return layers, parameters


def exact(plan: Plan, layers: Sequence[str], parameters: Sequence[str]) -> Plan:
    """`plan` aimed at exactly these layers and parameters."""
    nothing = {} if layers or parameters else {"target_modules": ()}
    return dataclasses.replace(plan, **{**PATTERNS, **nothing}, sites=(*layers, *parameters))


def saved_modules(names: Sequence[str] | None, source: Source, modules: Modules) -> tuple[str, ...]:
    """modules_to_save that the model has, by PEFT's rule; PEFT lists heads that a model may not have."""
    for name in names or ():
        if ends_with([name], modules):
            continue
        if any(f".{name}." in f".{strip(key, modules)}" for key in source.header):
            known = {n.rsplit(".", 1)[-1] for n in modules if n}
            raise FileError(
                f"{source.config_file}: modules_to_save names {name!r}, which this model has not{suggest(name, known)}"
            )
        if name not in AUTOMATIC:
            warnings.warn(
                f"{source.config_file}: modules_to_save names {name!r}; neither the file nor the model has it",
                stacklevel=6,
            )
    meant = ends_with(names or (), modules)
    dotted = {n for n in modules if matches(tuple(names or ()), n)}
    return tuple(n for n in names or () if ends_with([n], modules)) if meant == dotted else tuple(sorted(meant))


def with_ties(values: Values, modules: Modules) -> dict[str, Any]:
    """The values with what `ensure_weight_tying` means on this model: whatever is tied to a module that is saved, or
    else to one that is a target, is so too. PEFT trains such copies as one; here each trains on its own.
    """
    found = dict(values)
    if not found.get("ensure_weight_tying"):
        return found
    saved = _tied_to(ends_with(found["modules_to_save"] or (), modules), modules)
    if saved:
        return {**found, "modules_to_save": [*found["modules_to_save"], *saved]}
    target = found["target_modules"]
    tied = _tied_to(selected(found, modules) if target else (), modules)
    if tied:
        found["target_modules"] = None if isinstance(target, str) else [*target, *tied]
    return found


def _tied_to(names: Iterable[str], modules: Modules) -> list[str]:
    """The other modules whose weight is that of one of these."""
    own = {
        id(modules[name]._parameters["weight"]) for name in names if modules[name]._parameters.get("weight") is not None
    }
    here = set(names)
    return [n for n, m in modules.items() if n not in here and id(m._parameters.get("weight")) in own]


def _wrong_base(source: Source, key: str, owner: str, modules: Modules) -> FileError:
    said = source.config.get("base_model_name_or_path")
    base = f"; the adapter was made for {said!r}" if said else ""
    return FileError(
        f"{source.weights_file}: tensor {key!r} belongs to a module {owner!r}, which this model has not"
        f"{suggest(owner, [n for n in modules if n], n=2)}. Is it the right base model{base}?"
    )


def excluded(said: Any, modules: Modules) -> Any:
    """PEFT's `exclude_modules` in our words: PEFT excludes the layers that it names and nothing that is inside them."""
    words = (said,) if isinstance(said, str) else tuple(said or ())
    hit = {w: [n for n in modules if matches(w if isinstance(said, str) else (w,), n)] for w in words}
    if not any(modules[name]._modules for names in hit.values() for name in names):
        return tuples(said or ())
    return tuple(sorted({name for names in hit.values() for name in names if not modules[name]._modules}))


def tuples(value: Any) -> Any:
    """Lists, at any depth, as tuples."""
    if isinstance(value, list):
        return tuple(tuples(v) for v in value)
    if isinstance(value, dict):
        return {k: tuples(v) for k, v in value.items()}
    return value


def _owners(source: Source, suffixes: Sequence[str], modules: Modules) -> dict[str, str]:
    """Name of every adapted module in the file, with one of its keys."""
    owners: dict[str, str] = {}
    for key in source.header:
        suffix = next((s for s in suffixes if key.endswith(f".{s}")), None)
        if suffix is not None:
            owners.setdefault(strip(key.removesuffix(f".{suffix}"), modules), key)
    return owners


def _agree(source: Source, values: Values, modules: Modules, layers: set[str]) -> None:
    """The config's targets and the file's tensors name the same modules."""
    target = values["target_modules"]
    blocks_in = values.get("layers_pattern") or ()
    for field in ("target_modules", "exclude_modules"):
        said = values.get(field)
        check_expressions(field, [said] if isinstance(said, str) else (), source.config_file)
    blocks_in = [blocks_in] if isinstance(blocks_in, str) else blocks_in
    check_expressions("layers_pattern", blocks_in, source.config_file, searched=True)
    if target is None or target == "all-linear":
        return
    meant = selected(values, modules)
    said = ", ".join(f"{field}={values[field]!r}" for field in TARGETING if values.get(field) is not None)
    for name in sorted(meant - layers):
        raise FileError(
            f"{source.weights_file}: no tensor for {name!r}, which {said} of {source.config_file} names; "
            "the file is incomplete"
        )
    for name in sorted(layers - meant):
        raise FileError(
            f"{source.weights_file}: has tensors for {name!r}, which {said} of {source.config_file} does not name; "
            "config and weights do not belong together"
        )
