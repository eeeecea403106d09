"""Attaching and detaching: a plan becomes adapters at its sites, and leaves no trace when it goes."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rankloom.core.adapter import Adapter, Sum
from rankloom.core.bank import NAME, Bank
from rankloom.core.burst import burst
from rankloom.core.fingerprint import fingerprint
from rankloom.core.graft import add_adapter, add_shared, check_forward, remove_adapter
from rankloom.core.method import Method
from rankloom.core.own_methods import tell_in_own_methods, tell_no_more
from rankloom.core.plan import Plan, as_plan
from rankloom.core.prepare import kept_layers, prepare
from rankloom.core.replicate import replicate
from rankloom.core.selection import Active, Selection
from rankloom.core.shared import Shared
from rankloom.core.site import Site
from rankloom.core.slots import present
from rankloom.core.start import Calibration
from rankloom.core.targets import base_tensors, block_index, block_path, hidden_width, pattern_key, resolve
from rankloom.core.undriven import watch
from rankloom.core.whole import TokenRows, Whole
from rankloom.errors import NotMergeable, SettingsError, StateError, TargetError, suggest
from rankloom.store.base import Packed

LOG = logging.getLogger("rankloom")


@burst()
def attach(
    model: nn.Module,
    plan: Plan | Method,
    name: str = "default",
    *,
    like: str | None = None,
    probe: Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
    **overrides: Any,
) -> Bank:
    """Adapt `model` in place by a plan, or by a method and the plan's settings as keywords; returns `model.rankloom`.

    The base is frozen, every change starts at zero, and the first adapter of a model is active at once. `like`: an
    adapter of the model, at whose very sites this one is to be (`Plan.sites`). `probe`: a batch of keyword arguments
    for the model; sites that it never reaches are refused (`UnreachedError`). A plan with a store packs the weights of
    the base for good; `calibration`: batches of keyword arguments for a start that looks at data. Raises `TargetError`,
    `SettingsError` before anything is touched.
    """
    bank = existing_bank(model)
    plan = as_plan(plan, overrides if like is None else {**overrides, "sites": bank_of(model).adapted(like)})
    plan = _beside(bank, plan)
    check_name(name, bank)
    if bank is not None and bank.merged:
        raise StateError(f"attach: {', '.join(map(repr, bank.merged))} is merged into the base; unmerge() first")
    if plan.layer_replication and bank is not None:
        raise SettingsError("layer_replication makes the model deeper: give it to the first adapter, before any other")
    flags = {f"{p}.{k}": v.requires_grad for p, _, k, v in base_tensors(model)} if bank is None else {}
    undo = [replicate(model, plan.layer_replication)] if plan.layer_replication else []
    try:
        kept = kept_layers(model, plan)
        if bank is not None and bank.journal.folds and not all(isinstance(w.weight, Packed) for w in kept.values()):
            raise StateError(
                f"attach: the store {plan.store} would pack a base into which changes were folded, and they could not "
                "be folded again: pack the base first"
            )
        sites, shared = build(model, plan)
        _check_covered(bank, plan, sites)
    except BaseException:
        for step in undo:
            step()
        raise
    if bank is None:
        bank = Bank(model)
        bank._requires_grad = flags
        vars(model)["rankloom"] = bank
        tell_in_own_methods(bank)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    _add(bank, name, plan, sites, shared, undo)
    try:
        bank.reset(name)
        undo.append(plan.method.patch(model))
        watch(bank, name, plan)
        if probe is not None:
            with bank.using(name):
                bank.require_reached(**probe)
        if plan.store is not None:
            bank.handed = bank.handed or fingerprint(model)
            bank._requires_grad.update({f"{path}.weight": False for path in prepare(bank, name, calibration)})
    except BaseException:
        detach(model, name)
        raise
    if len(bank.names) == 1:
        bank.selector.default = Selection((Active(name),))
    return bank


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take one adapter (or all) off; others that are merged stay merged. Without adapters the model is exactly as it
    was handed to `attach`, except that weights which a plan's store packed stay packed, and that what was folded into
    the base stays in it (logged).
    """
    bank = bank_of(model)
    if name is not None:
        bank._known(name)
    gone = [name] if name is not None else list(bank.names)
    _check_detachable(bank, gone)
    merged: dict[str, Any] = {each: weight for each, weight in bank._merged.items() if each not in gone}
    again = merged != bank._merged
    if again:
        bank.unmerge()
    for each in gone:
        for undo in reversed(bank._undo.pop(each)):
            undo()
        for site in bank._sites.pop(each):
            remove_adapter(site.layer, site.slot, each)
        del bank.plans[each], bank._shared[each]
        bank.started.pop(each, None)
        left = tuple(v for v in bank.selector.default.active if v.name != each)
        if left != bank.selector.default.active:
            bank.selector.default = dataclasses.replace(bank.selector.default, active=left, segments=None)
    if again and merged:
        bank.merge(**bank._merged_how, **merged)
    if not bank.names:
        if bank.journal.folds:
            LOG.warning(
                "detach: the base keeps what was folded into it (%d folds, %d sites); load it anew for the original",
                len(bank.journal),
                len(bank.journal.sites),
            )
        for path, _, key, value in base_tensors(model):
            value.requires_grad_(bank._requires_grad[f"{path}.{key}"])
        del model.rankloom
        tell_no_more(model)
    return model


def _beside(bank: Bank | None, plan: Plan) -> Plan:
    """The plan of an adapter that builds on others: at the sites of those, unless it says where."""
    needed = plan.method.needs()
    known = () if bank is None else bank.names
    missing = [n for n in needed if n not in known]
    if missing:
        raise TargetError(
            f"{type(plan.method).__name__} builds on the adapter {missing[0]!r}, which is not in the bank: attach or "
            f"load it first, as load(model, folder, name={missing[0]!r}){suggest(missing[0], known)}"
        )
    if bank is None or not needed or plan.target_modules != "all-linear" or plan.target_parameters or plan.sites:
        return plan
    sites = dict.fromkeys(site.name for name in needed for site in bank.sites(name) if len(site.shape) > 1)
    return dataclasses.replace(plan, sites=tuple(sites))


def _check_covered(bank: Bank | None, plan: Plan, sites: list[Site]) -> None:
    """Refuse an adapter that builds on others, but not at every site of theirs."""
    here = {site.name for site in sites}
    for name in plan.method.needs():
        for site in bank.sites(name) if bank is not None else ():
            if site.name not in here:
                raise TargetError(
                    f"adapter {name!r} also changes {site.name!r}, which is not among the targets of the "
                    f"{type(plan.method).__name__} of it; leave target_modules out to have all sites of such adapters"
                )


def _check_detachable(bank: Bank, gone: list[str]) -> None:
    staying = [n for n in bank.names if n not in gone]
    for other in staying:
        for needed in set(bank.plans[other].method.needs()) & set(gone):
            raise StateError(f"adapter {other!r} builds on {needed!r}: detach {other!r} first")
    for name in gone:
        if staying and bank.plans[name].layer_replication:
            raise StateError(f"adapter {name!r} made the model deeper; detach {staying[0]!r}, which needs that, first")
        for site in bank._sites[name]:
            check_forward(site.layer, site.path)


def existing_bank(model: nn.Module) -> Bank | None:
    """The bank of a model, if it has one. Raises `TargetError` where something else sits in its place."""
    found = getattr(model, "rankloom", None)
    if found is not None and not isinstance(found, Bank):
        raise TargetError(
            f"this {type(model).__name__} has an attribute 'rankloom' of its own (a {type(found).__name__}), where the "
            "adapters' bank belongs: rename it"
        )
    return found


def bank_of(model: nn.Module) -> Bank:
    """The bank of an adapted model."""
    bank = getattr(model, "rankloom", None)
    if not isinstance(bank, Bank):
        raise StateError(f"this {type(model).__name__} has no adapters: rankloom.attach(model, …) first")
    return bank


def check_name(name: str, bank: Bank | None) -> None:
    """Refuse what cannot name an adapter (`SettingsError`), and a name that is taken (`StateError`)."""
    if not NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name) or name in ("rows", "context", "of"):
        raise SettingsError(
            f"{name!r} cannot name an adapter: letters, digits, '_' and '-', at most 64, "
            "and none that modules or use() keep for themselves"
        )
    if bank is not None and name in bank.plans:
        raise StateError(f"there is an adapter {name!r} already: detach(model, {name!r}) first, or choose another name")


def build(model: nn.Module, plan: Plan) -> tuple[list[Site], Shared]:
    """The sites of `plan` with their adapters, unfilled and not yet added to the model, and what they share."""
    resolution = resolve(model, plan)
    shared = Shared()
    shapes = [site.shape for site in resolution.adapted]
    widest = (max((s[-2] for s in shapes if len(s) > 1), default=0), max((s[-1] for s in shapes), default=0))
    tokens = [site for site, _, _ in resolution.tokens]
    hidden = hidden_width(model)
    for sites in (resolution.adapted, resolution.whole, tokens):
        for index, site in enumerate(sites):
            _ready(site, plan, shared, widest)
            site.hidden = hidden
            if sites is resolution.adapted:
                site.index, site.count = index, len(shapes)
    parts: list[tuple[Site, Method]] = [(site, _method_at(plan, site.name)) for site in resolution.adapted]
    parts += [(site, Whole()) for site in resolution.whole]
    parts += [(site, TokenRows(indices, source)) for site, indices, source in resolution.tokens]
    if resolution.whole:
        _warn_of_ties(model, resolution.whole)
    built: dict[tuple[int, str], tuple[Site, list[Adapter]]] = {}
    checked: set[type[Method]] = set()
    for site, method in parts:
        adapter = method.build(site)
        if adapter is None:
            continue
        if site.bare and type(method) not in checked:
            _check_bare(adapter, site, method)
            checked.add(type(method))
        built.setdefault((id(site.layer), site.slot), (site, []))[1].append(adapter)
    if not built:
        raise TargetError(f"method {type(plan.method).__name__} left every one of the {len(parts)} targets alone")
    for site, found in built.values():
        site.adapter = found[0] if len(found) == 1 else Sum(site.name, found)
    return [site for site, _ in built.values()], shared


def _check_bare(adapter: Adapter, site: Site, method: Method) -> None:
    try:
        with torch.no_grad(), present(site.layer):
            adapter.delta(site.base)
    except NotMergeable as error:
        raise TargetError(
            f"site {site.name!r} is a bare parameter, and {type(method).__name__} has no single matrix for it: {error}"
        ) from error


def _method_at(plan: Plan, name: str) -> Method:
    rank, alpha = pattern_key(plan.rank_pattern, name), pattern_key(plan.alpha_pattern, name)
    changes: dict[str, Any] = {} if rank is None else {"r": plan.rank_pattern[rank]}
    if alpha is not None:
        changes["lora_alpha"] = plan.alpha_pattern[alpha]
    return plan.method.override(**changes) if changes else plan.method


def _ready(site: Site, plan: Plan, shared: Shared, widest: tuple[int, int]) -> None:
    """Fill in what the plan adds to a site."""
    weight = site.kind.tensor(site.layer)
    hook = site.layer.__dict__.get("_hf_hook")
    device = getattr(hook, "execution_device", None) if weight.device.type == "meta" and hook is not None else None
    site.block = block_index(site.path, plan.layers_pattern)
    site.block_path = block_path(site.path, plan.layers_pattern)
    site.widest, site.shared = widest, shared
    site.dtype = _dtype(plan, site, weight)
    site.device = torch.device(device) if device is not None else weight.device


def _dtype(plan: Plan, site: Site, weight: torch.Tensor) -> torch.dtype:
    if weight.is_complex():
        raise TargetError(
            f"{site.name!r} is {weight.dtype}: no file of adapters holds complex numbers; exclude it "
            f"(exclude_modules=[{site.name!r}])"
        )
    if site.buffer:
        return weight.dtype
    if plan.dtype is not None:
        dtype = getattr(torch, plan.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise SettingsError(f"dtype={plan.dtype!r} is no floating dtype; try 'float32' or 'bfloat16'")
        return dtype
    return torch.promote_types(weight.dtype, torch.float32)


def _add(bank: Bank, name: str, plan: Plan, sites: list[Site], shared: Shared, undo: list[Any]) -> None:
    bank.plans[name] = plan
    bank._shared[name] = shared
    bank._undo[name] = undo
    bank._sites[name] = []
    try:
        for site in sites:
            site.adapter.train(bank.model.training)
            with present(site.layer):
                add_adapter(site.layer, site.slot, name, site.adapter, bank.selector, site.path, site.kind)
            bank._sites[name].append(site)
        shared.train(bank.model.training)
        if len(shared._parameters) or len(shared._modules):
            add_shared(sites[0].layer, name, shared)
    except BaseException:
        detach(bank.model, name)
        raise


def _warn_of_ties(model: nn.Module, whole: tuple[Site, ...]) -> None:
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    mine = {p.name for p in whole}
    for site in whole:
        others = [n for n in owners.get(id(site.kind.tensor(site.layer)), []) if n not in mine]
        if others and not site.name.endswith("bias"):
            warnings.warn(
                f"{site.name!r} is trained whole but tied to {others[0]!r}, which keeps the base value; "
                "name both in modules_to_save, or train rows with trainable_token_indices",
                stacklevel=4,
            )
