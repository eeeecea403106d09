"""Starts that split the base: the weight becomes its quantised part, the factors take what a low rank can correct."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankloom.core.bank import Bank, Fitted
from rankloom.core.graft import LAYER
from rankloom.errors import SettingsError, TargetError, suggest
from rankloom.methods.lora import LoRAAdapter
from rankloom.ops.decompose import SVD, Split, loftq, lq, lqer
from rankloom.store.base import Store, dense
from rankloom.store.bridges import bridge_of


@dataclass(frozen=True)
class LoftQ:
    """Q first, `iters` rounds, the best one kept; 0 rounds is QLoRA (arXiv 2310.08659)."""

    iters: int = 5
    svd: SVD = "exact"

    def __call__(self, w: Tensor, store: Store, r: int, scale: float, evidence: Tensor | None) -> Split:
        return loftq(w, store, r, self.iters, scale, self.svd)


@dataclass(frozen=True)
class LQ:
    """SVD first, until the error rises; the evidence is Fisher information (arXiv 2311.12023)."""

    max_iters: int = 100
    svd: SVD = "exact"

    def __call__(self, w: Tensor, store: Store, r: int, scale: float, evidence: Tensor | None) -> Split:
        return lq(w, store, r, evidence, self.max_iters, scale, self.svd)


@dataclass(frozen=True)
class LQER:
    """One correction of the quantisation error; the evidence is the scale of the activations (arXiv 2402.02446)."""

    factors: Store | None = None

    def __call__(self, w: Tensor, store: Store, r: int, scale: float, evidence: Tensor | None) -> Split:
        return lqer(w, store, r, evidence, scale, self.factors)


How = Callable[[Tensor, Store, int, float, Tensor | None], Split]


@torch.no_grad()
def split_base(
    bank: Bank,
    how: How,
    store: Store | Mapping[str, Store],
    name: str = "default",
    evidence: Mapping[str, Tensor] | None = None,
) -> dict[str, Split]:
    """Replace the weight of every LoRA site by its quantised part and fill the factors, one site after the other.

    `store`: one for all sites, or one by site name (`mix(...).stores`); `evidence`: by site name, in the layout of the
    weight's matrix (out, in), or (in,). Factors stay at their start where the split has nothing to say. The base stays
    split after `detach`. Returns the splits' histories by site name. Raises before anything is replaced.
    """
    found = bank.fitted(name)
    for fitted in found:
        _check(fitted, store, evidence)
    return {f.site.name: _split_one(f, how, store, evidence) for f in found}


def _split_one(
    fitted: Fitted, how: How, store: Store | Mapping[str, Store], evidence: Mapping[str, Tensor] | None
) -> Split:
    layer, kind, adapter = fitted.place.layer, fitted.place.kind, fitted.adapter
    assert isinstance(adapter, LoRAAdapter)
    one = store if isinstance(store, Store) else store[fitted.site.name]
    known = None if evidence is None else evidence[fitted.site.name]
    made = how(dense(kind.tensor(layer)), one, adapter.A.shape[-2], adapter.scaling, known)
    layer._parameters[kind.parameter()] = nn.Parameter(made.q, requires_grad=False)
    if made.b.any():
        adapter.A.copy_(made.a)
        adapter.B.copy_(made.b)
    return made


def _check(fitted: Fitted, store: Store | Mapping[str, Store], evidence: Mapping[str, Tensor] | None) -> None:
    site = fitted.site
    if not isinstance(fitted.adapter, LoRAAdapter) or fitted.place.slot != LAYER or site.kind.name != "linear":
        raise TargetError(
            f"{site.name!r} ({site.kind.name}) has a {type(fitted.adapter).__name__}: a base is split for LoRA on "
            "linear layers; leave this site out, or pack it without a split"
        )
    bridge = bridge_of(fitted.place.kind.tensor(fitted.place.layer))
    if bridge is not None:
        raise TargetError(f"{site.name!r} is kept in few bits by {bridge.library} already: split a base in 16 bits")
    for what, table in (("store", store), ("evidence", evidence)):
        if isinstance(table, Mapping) and site.name not in table:
            raise SettingsError(f"no {what} for the site {site.name!r}{suggest(site.name, table)}")
