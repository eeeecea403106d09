"""Loading an adapter folder: everything is checked on a copy without weights before the model is touched."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from rankloom.core.attach import attach, build, check_name, detach, existing_bank
from rankloom.core.bank import Bank
from rankloom.core.burst import burst
from rankloom.core.journal import Journal
from rankloom.core.plan import Plan, plan_from_data
from rankloom.core.prepare import kept_layers
from rankloom.core.replicate import replicate
from rankloom.errors import FileError, SettingsError, StateError, TargetError, suggest
from rankloom.formats.base import skeleton
from rankloom.formats.basecheck import UnknownBase, check_base
from rankloom.formats.copies import Copies, FullTensors, check_copies, copied, with_full
from rankloom.formats.folds import Folds
from rankloom.formats.header import Header
from rankloom.formats.limits import Limits
from rankloom.formats.manifest import Source, open_folder
from rankloom.formats.native import PEFT_TYPE, Native, check_patterns
from rankloom.formats.peft import TRANSLATORS, unread
from rankloom.formats.peft.reading import exact
from rankloom.formats.peft.renaming import todays_names
from rankloom.formats.peft.translator import Translator
from rankloom.formats.view import View, arranged, view
from rankloom.settings import from_data
from rankloom.store.base import Packed, Store
from rankloom.store.model import frozen

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
    full_tensors: FullTensors = "compare",
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
        full_tensors: what becomes of base weights that a PEFT file has beside its adapter (embeddings of a larger
            vocabulary): "compare" refuses one that differs from the model's, "take" trains its module whole.
        pack: False leaves the base as it is, whatever store the adapter was trained on.
        unknown_base: a folder without a fingerprint of its base is a warning, or "refuse" for a server.
    """
    with open_folder(folder, limits, ignore) as source:
        return _load(model, source, name, base_check, unknown_base, full_tensors, pack)


def _load(
    model: nn.Module,
    source: Source,
    name: str,
    base_check: bool,
    unknown_base: UnknownBase,
    full_tensors: FullTensors,
    pack: bool,
) -> Bank:
    _check_name(name, source.limits)
    reader = reader_of(source)
    _check_bank(model, name)
    source = todays_names(source, model)
    reading = _Reading.of(reader, source, model, name)
    tensors = None
    if from_data(FullTensors, full_tensors, "full_tensors") == "take":
        tensors = source.tensors()
        source = with_full(source, reading.copies, tensors, model)
        reading = _Reading.of(reader, source, model, name)
    folds = reading.folds
    after = None if folds is None else folds.after
    afresh = check_base(source, model, reading.there, unknown_base, base_check, after)
    tensors = source.tensors() if tensors is None else tensors
    journal = folds.journal(tensors) if folds is not None and afresh else None
    _check_folds(source, model, journal)
    check_copies(source, reading.copies, tensors)
    with _fitting(source):
        bank = attach(model, _on_this_base(reading.plan, model, source, pack), name)
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
    bank.plans[name] = reading.kept
    return bank


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A folder on a copy of the model without weights: the plan to attach with and the one to keep, the adapter
    `there`, and what the tensors of the file copy that it does not ask for.
    """

    plan: Plan
    kept: Plan
    there: View
    folds: Folds | None
    copies: Copies

    @classmethod
    def of(cls, reader: Reader, source: Source, model: nn.Module, name: str) -> _Reading:
        copy = skeleton(model)
        plan, kept = _plans(reader, source, copy)
        there = _arranged(reader, source, copy, plan, name)
        expected = {entry.key: entry.get() for entry in reader.entries_in(there, source)}
        folds = Folds.of(source)
        if folds is not None:
            expected |= folds.expected(source, copy)
        return cls(plan, kept, there, folds, _check(source, expected, model))


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
        raise FileError(f"{source.config_file}: peft_type {said!r} {unread(said, [*TRANSLATORS, PEFT_TYPE])}")
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
    if not any(isinstance(frozen(layer, "weight"), Packed) for layer in kept_layers(model, plan).values()):
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


def _check(source: Source, expected: Mapping[str, Tensor], model: nn.Module) -> Copies:
    """Refuse missing, misshapen and unknown tensors; what the other tensors of the file copy."""
    header = source.header
    missing = [key for key in expected if key not in header]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileError(
            f"{source.weights_file}: tensor {missing[0]!r} of shape {tuple(expected[missing[0]].shape)} is missing"
            f"{more}{suggest(missing[0], header.keys() - expected.keys(), n=1)}"
        )
    copies = {key: copied(source, key, expected, model) for key in header if key not in expected}
    bases = {key: of for key, of in copies.items() if isinstance(of, Tensor)}
    for key, tensor in {**expected, **bases}.items():
        _fits(source, key, header[key], tensor)
    return copies


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
