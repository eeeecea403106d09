"""Starts that split the base: the weight becomes its quantised part, the factors take what a low rank can correct.

As a plan's `start` they run when the plan is attached; `split_base` runs one on a model that is attached already.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.site import LAYER, Site
from rankloom.core.start import Calibration, Evidence, Start, Started
from rankloom.core.thin import Thin
from rankloom.core.view import BankView
from rankloom.errors import NotMergeable, SettingsError, StateError, TargetError, suggest
from rankloom.ops.decompose import SVD, Split, loftq, lq, lqer
from rankloom.settings import Count, Steps
from rankloom.store.base import Packed, Store, dense
from rankloom.store.bridges import bridge_of
from rankloom.store.calibrate import activation_scales, fisher
from rankloom.store.model import frozen


class Splitter(Start):
    """Splits each weight on its own: W ≈ Q + s·B A."""

    @abstractmethod
    def split(self, w: Tensor, store: Store, r: int, scale: float, evidence: Tensor | None) -> Split:
        """One weight (out, in) in its store, at rank `r` and adapter scale `scale`."""

    def known(self, evidence: Evidence) -> Mapping[str, Tensor]:
        """The part of the evidence that `split` looks at."""
        return {}

    def check(self, bank: BankView, name: str) -> int:
        return max(map(_rank, bank.sites(name)))

    def apply(self, bank: BankView, name: str, stores: Mapping[str, Store], evidence: Evidence) -> dict[str, Started]:
        splits = split_base(bank, self, stores, name, self.known(evidence) if self.calibrated else None)
        return {site: Started(made.errors, made.best) for site, made in splits.items()}


@dataclass(frozen=True)
class LoftQ(Splitter):
    """Q first, `iters` rounds, the best one kept; 0 rounds is QLoRA (arXiv 2310.08659)."""

    iters: Steps = 5
    svd: SVD = "exact"

    def split(self, w: Tensor, store: Store, r: int, scale: float, evidence: Tensor | None) -> Split:
        return loftq(w, store, r, self.iters, scale, self.svd)


@dataclass(frozen=True)
class LQ(Splitter):
    """SVD first, until the error rises; with `fisher` errors are weighted by Fisher information, gathered one example
    at a time (arXiv 2311.12023).
    """

    fisher: bool = False
    max_iters: Count = 100
    svd: SVD = "exact"

    @property
    def calibrated(self) -> bool:
        return self.fisher

    def gather(self, model: nn.Module, layers: Mapping[str, nn.Module], batches: Calibration) -> Evidence:
        """Fisher information of every kept weight, from the model's own loss on single rows of the batches."""
        weights = {name: frozen(layer, "weight") for name, layer in layers.items()}
        return Evidence(fisher=fisher(weights, _rows(batches), lambda row: model(**row).loss))

    def known(self, evidence: Evidence) -> Mapping[str, Tensor]:
        return evidence.fisher

    def split(self, w: Tensor, store: Store, r: int, scale: float, evidence: Tensor | None) -> Split:
        return lq(w, store, r, evidence, self.max_iters, scale, self.svd)


@dataclass(frozen=True)
class LQER(Splitter):
    """One correction of the quantisation error; with `activations` (L²QER) weighted by the scale of each input channel;
    `factors`: what keeps the factors in fewer bits too (arXiv 2402.02446).
    """

    activations: bool = False
    factors: Store | None = None

    @property
    def calibrated(self) -> bool:
        return self.activations

    def gather(self, model: nn.Module, layers: Mapping[str, nn.Module], batches: Calibration) -> Evidence:
        """The scale of each input channel of every kept layer."""
        return Evidence(scales=activation_scales(layers, batches, lambda batch: model(**batch)))

    def known(self, evidence: Evidence) -> Mapping[str, Tensor]:
        return evidence.scales

    def split(self, w: Tensor, store: Store, r: int, scale: float, evidence: Tensor | None) -> Split:
        return lqer(w, store, r, evidence, scale, self.factors)


@torch.no_grad()
def split_base(
    bank: BankView,
    how: Splitter,
    store: Store | Mapping[str, Store],
    name: str = "default",
    evidence: Mapping[str, Tensor] | None = None,
) -> dict[str, Split]:
    """Replace the weight of every LoRA site by its quantised part and fill the factors, one site after the other.

    `store`: one for all sites, or one by site name (`mix(...).stores`); `evidence`: by site name, in the layout of the
    weight's matrix (out, in), or (in,). Factors stay at their start where the split has nothing to say. The base stays
    split after `detach`. Returns the splits by site name. Raises before anything is replaced.
    """
    found = bank.sites(name)
    for site in found:
        _check(site, store, evidence)
    return {f.name: _split_one(f, how, store, evidence) for f in found}


def _split_one(
    site: Site, how: Splitter, store: Store | Mapping[str, Store], evidence: Mapping[str, Tensor] | None
) -> Split:
    layer, kind, pair = site.layer, site.kind, _pair(site)
    assert pair is not None
    one = store if isinstance(store, Store) else store[site.name]
    known = None if evidence is None else evidence[site.name]
    made = how.split(dense(kind.tensor(layer)), one, pair.A.shape[-2], pair.scale, known)
    layer._parameters[kind.parameter()] = nn.Parameter(made.q, requires_grad=False)
    if made.b.any():
        pair.A.copy_(made.a)
        pair.B.copy_(made.b)
    return made


def _check(site: Site, store: Store | Mapping[str, Store], evidence: Mapping[str, Tensor] | None) -> None:
    _rank(site)
    for what, table in (("store", store), ("evidence", evidence)):
        if isinstance(table, Mapping) and site.name not in table:
            raise SettingsError(f"no {what} for the site {site.name!r}{suggest(site.name, table)}")


def _rank(site: Site) -> int:
    """The rank of a site. Refuses anything but LoRA on a linear layer, and a weight that is packed already."""
    pair = _pair(site)
    if pair is None or site.slot != LAYER or site.kind.name != "linear":
        raise TargetError(
            f"{site.name!r} ({site.kind.name}) has a {type(site.adapter).__name__}: a base is split for LoRA on "
            "linear layers; leave this site out, or pack it without a split"
        )
    weight = site.kind.tensor(site.layer)
    if isinstance(weight, Packed):
        raise StateError(
            f"the weight of {site.name!r} is packed already ({weight.store}): a split needs the dense base; load it "
            "anew, or leave the plan's start out"
        )
    bridge = bridge_of(weight)
    if bridge is not None:
        raise TargetError(f"{site.name!r} is kept in few bits by {bridge.library} already: split a base in 16 bits")
    return int(pair.A.shape[-2])


def _pair(site: Site) -> Thin | None:
    """The adapter's thin form where that is a pair of its own tensors and nothing more, so that they can be filled."""
    try:
        thin = site.adapter.thin(site.base, None)
    except NotMergeable:
        return None
    if thin is None or any(part is not None for part in (thin.inner, thin.outer, thin.magnitude)):
        return None
    own = {id(parameter) for parameter in site.adapter.parameters()}
    return thin if {id(thin.A), id(thin.B)} <= own else None


def _rows(batches: Calibration) -> Iterator[dict[str, Any]]:
    """The single rows of the batches, each as a batch of one."""
    for batch in batches:
        rows = next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)
        for i in range(rows):
            yield {k: v[i : i + 1] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}
