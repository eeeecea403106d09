"""Loading an adapter folder: everything is checked on a copy without weights before the model is touched."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from rankloom.core.attach import attach, build, check_name, detach, existing_bank
from rankloom.core.bank import Bank
from rankloom.core.burst import burst
from rankloom.core.journal import Journal
from rankloom.core.plan import Plan, plan_from_data
from rankloom.core.prepare import kept_layers
from rankloom.core.replicate import replicate
from rankloom.core.targets import base_modules
from rankloom.errors import FileError, SettingsError, StateError, TargetError, suggest
from rankloom.formats.base import skeleton
from rankloom.formats.basecheck import UnknownBase, check_base
from rankloom.formats.folds import Folds
from rankloom.formats.header import Header
from rankloom.formats.limits import Limits
from rankloom.formats.manifest import Source, open_folder
from rankloom.formats.native import PEFT_TYPE, Native, check_patterns
from rankloom.formats.peft import TRANSLATORS
from rankloom.formats.peft.paths import strip
from rankloom.formats.peft.reading import exact
from rankloom.formats.peft.translator import Translator
from rankloom.formats.view import View, arranged, view
from rankloom.store.base import Packed, Store

Reader = Native | Translator


@burst()
def load(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    limits: Limits | None = None,
    ignore: Collection[str] = (),
    base_check: bool = True,
    unknown_base: UnknownBase = "warn",
    pack: bool = True,
) -> Bank:
    """Attach the adapter in `folder` to `model` under `name`; a PEFT or a native folder is recognised by itself.

    Files, keys, shapes, dtypes and values are checked first, and only tensors that the method owns are written. Raises
    `FileError` naming file, tensor and shapes, or modules that this model has not; the model is then as before. A name
    that is taken is a `StateError`.

    Args:
        limits: how large config, weights and numbers may be (`rankloom limits`).
        ignore: config fields that are unknown here and that you know to change nothing.
        base_check: False loads the adapter on another base than it was saved with; that is logged.
        pack: False leaves the base as it is, whatever store the adapter was trained on.
        unknown_base: a folder without a fingerprint of its base is a warning, or "refuse" for a server.
    """
    with open_folder(folder, limits, ignore) as source:
        return _load(model, source, name, base_check, unknown_base, pack)


def _load(model: nn.Module, source: Source, name: str, base_check: bool, unknown_base: UnknownBase, pack: bool) -> Bank:
    _check_name(name, source.limits)
    reader = reader_of(source)
    _check_bank(model, name)
    copy = skeleton(model)
    plan, kept = _plans(reader, source, copy)
    there = _arranged(reader, source, copy, plan, name)
    expected = {entry.key: entry.get() for entry in reader.entries_in(there, source)}
    folds = Folds.of(source)
    if folds is not None:
        expected |= folds.expected(source, copy)
    copies = _check(source, expected, model)
    afresh = check_base(source, model, there, unknown_base, base_check, None if folds is None else folds.after)
    tensors = source.tensors()
    journal = folds.journal(tensors) if folds is not None and afresh else None
    _check_folds(source, model, journal)
    for key, of in copies.items():
        _is_copy(source, key, tensors[key], of, tensors)
    with _fitting(source):
        bank = attach(model, _on_this_base(plan, model, source, pack), name)
    try:
        if journal is not None and not bank.journal.folds:
            _refold(bank, journal)
        sorted_ = view(bank, name)
        reader.prepare(sorted_, source)
        for entry in reader.entries_in(sorted_, source):
            entry.put(tensors[entry.key])
    except FileError as error:
        detach(model, name)
        raise FileError(f"{source.weights_file}: {error}") from error
    except BaseException:
        detach(model, name)
        raise
    bank.plans[name] = kept
    return bank


def _check_folds(source: Source, model: nn.Module, journal: Journal | None) -> None:
    """Refuse folds under adapters that are there already: they would change the base of these."""
    bank = getattr(model, "rankloom", None)
    if journal is None or not isinstance(bank, Bank):
        return
    if len(journal) != len(bank.journal) or not journal.continues(bank.journal):
        raise StateError(
            f"{source.folder}: the adapter belongs on a base with {len(journal)} folds of its own, which would change "
            f"the base of {', '.join(map(repr, bank.names))}: load it into a model of its own, or export it as LoRA"
        )


def _refold(bank: Bank, journal: Journal) -> None:
    """Fold all of it, or leave the base as it is."""
    bank.keep_originals()
    try:
        bank.refold(journal)
    except BaseException:
        bank.unfold()
        raise
    bank.forget_originals()


def reader_of(source: Source) -> Reader:
    """What reads a folder, by the `peft_type` of its config."""
    said = source.config["peft_type"]
    if said == PEFT_TYPE:
        return Native()
    if said not in TRANSLATORS:
        raise FileError(
            f"{source.config_file}: peft_type {said!r} cannot be read{suggest(said, [*TRANSLATORS, PEFT_TYPE])}; "
            "convert it to LORA with PEFT (save_as_lora) or merge it there"
        )
    return TRANSLATORS[said]


def kept_plan(source: Source) -> Plan | None:
    """The plan that a folder of ours was saved with."""
    if source.plan is None:
        return None
    plan = plan_from_data(source.plan, str(source.folder))
    check_patterns(plan, str(source.folder))
    return plan


def _check_bank(model: nn.Module, name: str) -> None:
    bank = existing_bank(model)
    check_name(name, bank)
    if bank is not None and bank.merged:
        raise StateError(f"load: {', '.join(map(repr, bank.merged))} is merged into the base; unmerge() first")


def _on_this_base(plan: Plan, model: nn.Module, source: Source, pack: bool) -> Plan:
    """The plan without what made its base, which must be there: a start's factors are in the file."""
    if isinstance(plan.store, Store | None) and plan.start is None:
        return plan if pack else dataclasses.replace(plan, store=None, store_skip_modules=())
    if not any(isinstance(layer.get_parameter("weight"), Packed) for layer in kept_layers(model, plan).values()):
        raise FileError(
            f"{source.config_file}: the adapter belongs on the base that {plan.start or plan.store} made: load "
            "that one (the folder base/ of its run, or what `rankloom quantize` wrote), not the dense one"
        )
    return dataclasses.replace(plan, start=None)


def _plans(reader: Reader, source: Source, copy: nn.Module) -> tuple[Plan, Plan]:
    try:
        kept = kept_plan(source)
        if kept is None or isinstance(reader, Native):
            return reader.plans(source, copy)
        return exact(kept, *reader.places(source, copy)), kept
    except (SettingsError, TargetError) as error:
        raise FileError(f"{source.config_file}: {error}") from error


def _check_name(name: str, limits: Limits) -> None:
    if len(name) > limits.name:
        raise StateError(f"{name[: limits.name]!r}… cannot name an adapter: at most {limits.name} letters")


def _arranged(reader: Reader, source: Source, copy: nn.Module, plan: Plan, name: str) -> View:
    """The adapter for the copy: its tensors are the file's as they must be, on the meta device."""
    with _fitting(source), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if plan.layer_replication:
            replicate(copy, plan.layer_replication)
        site, shared = build(copy, plan)
    sorted_ = arranged(copy, name, plan, site, shared)
    reader.prepare(sorted_, source)
    return sorted_


@contextmanager
def _fitting(source: Source) -> Iterator[None]:
    """What a plan refuses about the model, as a fault of the file."""
    try:
        yield
    except (SettingsError, TargetError) as error:
        raise FileError(f"{source.config_file} does not fit this model: {error}") from error


def _check(source: Source, expected: Mapping[str, Tensor], model: nn.Module) -> dict[str, str | Tensor]:
    """Refuse missing, misshapen and unknown tensors; what the other tensors of the file copy."""
    header = source.header
    missing = [key for key in expected if key not in header]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileError(
            f"{source.weights_file}: tensor {missing[0]!r} of shape {tuple(expected[missing[0]].shape)} is missing"
            f"{more}{suggest(missing[0], header.keys() - expected.keys(), n=1)}"
        )
    for key, tensor in expected.items():
        _fits(source, key, header[key], tensor)
    return {key: _copied(source, key, expected, model) for key in header if key not in expected}


def _copied(source: Source, key: str, expected: Mapping[str, Tensor], model: nn.Module) -> str | Tensor:
    """What a tensor that nothing asks for is a copy of: another key of the file, or a tensor of the base."""
    twin = key.replace(".modules_to_save.", ".")
    if twin != key and twin in expected:
        return twin
    modules = dict(base_modules(model))
    owner, _, leaf = strip(key, modules).replace(".original_module.", ".").rpartition(".")
    module = modules.get(owner)
    both = {} if module is None else {**module._parameters, **module._buffers}
    base = both.get(leaf)
    if base is None:
        raise FileError(
            f"{source.weights_file}: tensor {key!r} of shape {source.header[key].shape} belongs to nothing that the "
            f"config adapts{suggest(key, expected, n=1)}"
        )
    _fits(source, key, source.header[key], base)
    return base


def _fits(source: Source, key: str, said: Header, tensor: Tensor) -> None:
    if said.shape != tuple(tensor.shape):
        base = source.config.get("base_model_name_or_path")
        made = f" (the adapter was made for {base!r})" if base else ""
        raise FileError(
            f"{source.weights_file}: tensor {key!r} has shape {said.shape}; this model and {source.config_file} need "
            f"{tuple(tensor.shape)}{made}"
        )
    if said.dtype != tensor.dtype and not (said.dtype.is_floating_point and tensor.is_floating_point()):
        raise FileError(f"{source.weights_file}: tensor {key!r} has dtype {said.dtype}; expected {tensor.dtype}")


def _is_copy(source: Source, key: str, tensor: Tensor, of: str | Tensor, tensors: Mapping[str, Tensor]) -> None:
    """A copy (PEFT writes some) must equal what it copies: it is never written."""
    here = tensors[of] if isinstance(of, str) else of.detach().cpu()
    if torch.equal(tensor.to(here.dtype), here) or torch.equal(here.to(tensor.dtype), tensor):
        return
    name = of if isinstance(of, str) else strip(key, ())
    raise FileError(
        f"{source.weights_file}: tensor {key!r} differs from {name!r}, which it should copy, and would overwrite it: "
        "the adapter was trained on another base, or trained this tensor too (use modules_to_save)"
    )
