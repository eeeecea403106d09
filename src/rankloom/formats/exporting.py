"""Any mergeable adapter as plain LoRA: the best rank-r part of every change, with the error stated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.compose.arithmetic import Part, Sum, overall, place, summed
from rankloom.core import thin as forms
from rankloom.core.attach import bank_of, detach
from rankloom.core.bank import Bank
from rankloom.core.journal import Edit, Journal
from rankloom.core.plan import Plan
from rankloom.core.slots import present
from rankloom.core.whole import tokens_key
from rankloom.errors import NotMergeable, SettingsError, suggest
from rankloom.formats.saving import SaveReport, parcel_of
from rankloom.formats.view import View, view
from rankloom.ops.linalg import truncated_svd
from rankloom.settings import Rank, from_data

FORMATS = ("lora",)
BORROWED = "rankloom-export"
DEFAULT = 8
"""Rank to which a dense change is cut."""


@dataclass(frozen=True)
class ExportReport:
    """`errors`: ‖ΔW − B A‖_F / ‖ΔW‖_F by site; `error`: the same over all sites together; `saved`: what was written."""

    errors: dict[str, float]
    error: float
    saved: SaveReport


def export(
    model: nn.Module,
    folder: str | Path,
    name: str = "default",
    *,
    as_: str = "lora",
    r: int | None = None,
    card: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write the adapter `name` as plain LoRA of rank `r` at most: everything that was folded into the base, and its own
    change. It belongs on the base as it was before the folds.

    Thin changes lie side by side, exactly, at the sum of their ranks, or are cut down to `r` by a QR and a small SVD;
    the ΔW (…, out, in) of any other by a truncated SVD (`r=None`: to rank 8). Tensors trained whole, biases and token
    rows go along unchanged. Raises `NotMergeable` where a change has no single matrix; the model is then as before.
    """
    if as_ not in FORMATS:
        raise SettingsError(f"as_={as_!r}: nothing exports to that{suggest(as_, FORMATS)}")
    if r is not None:
        from_data(Rank, r, "export.r")
    bank = bank_of(model)
    source = view(bank, name)
    total = _total(source, bank.journal)
    made = total.pairs(r)
    active = bank.selector.default
    try:
        place(bank, BORROWED, {at: (each.a, each.b) for at, each in made.items()}, name, lora_bias=bool(total.shifts))
        bank.selector.default = active
        _shift(bank, total.shifts)
        _copy_rest(bank, name)
        saved = parcel_of(view(bank, BORROWED)).write(folder, card or {})
        saved = dataclasses.replace(saved, notes=(*saved.notes, *_base_notes(source.plan)))
    finally:
        if BORROWED in bank.names:
            detach(model, BORROWED)
    return ExportReport({n: e.lost / e.size if e.size else 0.0 for n, e in made.items()}, overall(made.values()), saved)


def _base_notes(plan: Plan) -> Iterator[str]:
    if plan.start is not None:
        yield f"it belongs on the base that {plan.start} made, kept as {plan.store}: PEFT needs that very base, dense"


@dataclass(frozen=True)
class _Total:
    """Everything that is to go into one LoRA, by site: thin `parts`, `dense` changes, and `shifts` of biases."""

    parts: dict[str, list[Part]]
    dense: dict[str, Tensor]
    shifts: dict[str, Tensor]

    def pairs(self, r: int | None) -> dict[str, Sum]:
        """One pair of factors for each site."""
        thin = {at: found for at, found in self.parts.items() if at not in self.dense}
        long = {at for at, found in thin.items() if r is not None and sum(p.a.shape[-2] for p in found) > r}
        made = summed({at: found for at, found in thin.items() if at not in long}, "cat", 0)
        made |= summed({at: thin[at] for at in thin if at in long}, "svd", r or 0)
        for at, change in self.dense.items():
            for part in self.parts.get(at, ()):
                change = change + part.weight * part.scale * (part.b @ part.a).to(change)
            made[at] = _cut(change, DEFAULT if r is None else r)
        return {at: made[at] for at in dict.fromkeys([*self.parts, *self.dense])}


def _total(source: View, journal: Journal) -> _Total:
    found = _Total({}, {}, {})
    with torch.no_grad():
        for site, adapter in source.adapted:
            with present(site.layer):
                thin = adapter.thin(site.base, None)
                if thin is None or thin.magnitude is not None:
                    found.dense[site.name] = adapter.delta(site.base).float()
                else:
                    found.parts[site.name] = [Part(*forms.factors(thin), 1.0, thin.scale)]
                shift = adapter.delta_bias(site.base)
            if shift is not None:
                found.shifts[site.name] = shift.detach()
        whole = {site.name for site, _ in source.whole}
        for edit in (edit for fold in journal.folds for edit in fold.edits if edit.name not in whole):
            _add(found, edit)
    return found


def _add(found: _Total, edit: Edit) -> None:
    """What a fold did to one tensor, added to the rest."""
    device = next((p.a.device for parts in found.parts.values() for p in parts), torch.device("cpu"))
    for term in edit.terms:
        if term.replaces:
            raise NotMergeable(
                f"export: {edit.name!r} was trained whole and folded into the base, which LoRA cannot hold: "
                "rankloom.save keeps it"
            )
        if term.pair is not None:
            a, b = term.pair
            found.parts.setdefault(edit.name, []).append(Part(a.to(device), b.to(device), 1.0, term.scale))
            continue
        table, at = (found.shifts, edit.path) if edit.slot == "bias" else (found.dense, edit.name)
        change = term.scale * term[1].to(device).float()
        table[at] = table[at] + change.to(table[at]) if at in table else change


def _cut(change: Tensor, r: int) -> Sum:
    u, s, vh = truncated_svd(change, r)
    a, b = s.sqrt()[..., None] * vh, u * s.sqrt()[..., None, :]
    return Sum(a, b, float(change.norm()), float((change - b @ a).norm()))


def _shift(bank: Bank, shifts: Mapping[str, Tensor]) -> None:
    for site, adapter in view(bank, BORROWED).adapted:
        if site.name in shifts:
            with torch.no_grad():
                adapter.bias.copy_(shifts[site.name])


def _copy_rest(bank: Bank, name: str) -> None:
    """Tensors trained whole and token rows, as they are."""
    old, new = view(bank, name), view(bank, BORROWED)
    values = {site.name: adapter.value for site, adapter in old.whole}
    with torch.no_grad():
        for site, adapter in new.whole:
            adapter.value.copy_(values[site.name])
        for site, rows in new.tokens:
            if rows.lookup:
                key = tokens_key(site.path)
                bank.shared_of(BORROWED).tensor(key).copy_(bank.shared_of(name).tensor(key))
