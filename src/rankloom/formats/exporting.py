"""Any mergeable adapter as plain LoRA: the best rank-r part of every change, with the error stated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.attach import attach, bank_of, detach
from rankloom.core.bank import Bank
from rankloom.core.slots import present
from rankloom.core.whole import tokens_key
from rankloom.errors import SettingsError, suggest
from rankloom.formats.peft.reading import exact
from rankloom.formats.peft.targets import our_targets
from rankloom.formats.saving import SaveReport, parcel_of
from rankloom.formats.view import View, view
from rankloom.methods.lora import LoRA, LoRAAdapter
from rankloom.ops.linalg import truncated_svd

FORMATS = ("lora",)
BORROWED = "rankloom-export"


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
    r: int = 8,
    card: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write the adapter `name` as plain LoRA of rank `r`, by truncated SVD of each site's ΔW (…, out, in).

    Tensors trained whole, biases and token rows go along unchanged. Raises `NotMergeable` where a change has no single
    matrix; the model is then as before.
    """
    if as_ not in FORMATS:
        raise SettingsError(f"as_={as_!r}: nothing exports to that{suggest(as_, FORMATS)}")
    bank = bank_of(model)
    source = view(bank, name)
    changes, shifts = _changes(source)
    plan = exact(source.plan, *map(sorted, our_targets(source)))
    method = LoRA(r=r, lora_alpha=float(r), lora_bias=bool(shifts))
    plan = dataclasses.replace(plan, method=method, rank_pattern={}, alpha_pattern={}, rules=(), layer_replication=())
    speaking = bank.selector.default
    attach(model, plan, BORROWED)
    try:
        bank.selector.default = speaking
        errors = _fill(bank, changes, shifts)
        _copy_rest(bank, name)
        bank.plans[BORROWED] = dataclasses.replace(
            plan, **{k: getattr(source.plan, k) for k in ("target_modules", *_KEPT)}
        )
        saved = parcel_of(view(bank, BORROWED)).write(folder, card or {})
    finally:
        detach(model, BORROWED)
    return ExportReport({n: e for n, (e, _) in errors.items()}, _overall(errors.values()), saved)


_KEPT = ("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters", "layer_replication")


def _changes(source: View) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    changes, shifts = {}, {}
    with torch.no_grad():
        for site, adapter in source.adapted:
            with present(site.layer):
                changes[site.name] = adapter.delta(site.base).float()
                shift = adapter.delta_bias(site.base)
            if shift is not None:
                shifts[site.name] = shift
    return changes, shifts


def _fill(bank: Bank, changes: Mapping[str, Tensor], shifts: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Put the truncated changes in; (relative error, ‖ΔW‖) of each site."""
    errors = {}
    for site, adapter in view(bank, BORROWED).adapted:
        assert isinstance(adapter, LoRAAdapter)
        change = changes[site.name]
        with torch.no_grad():
            u, s, vh = truncated_svd(change, adapter.A.shape[-2])
            adapter.A.zero_()[..., : vh.shape[-2], :] = s.sqrt()[..., None] * vh
            adapter.B.zero_()[..., : u.shape[-1]] = u * s.sqrt()[..., None, :]
            if adapter.bias is not None and site.name in shifts:
                adapter.bias.copy_(shifts[site.name])
            size = float(change.norm())
            left = float((change - adapter.delta(site.base).float()).norm())
        errors[site.name] = (left / size if size else 0.0, size)
    return errors


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


def _overall(errors: Any) -> float:
    pairs = list(errors)
    total = math.sqrt(sum(size**2 for _, size in pairs))
    return math.sqrt(sum((error * size) ** 2 for error, size in pairs)) / total if total else 0.0
