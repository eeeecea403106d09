"""LoRA arithmetic: a new adapter that is a weighted sum of others, ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ, and no ΔW is ever built.

The ways and their names are those of PEFT's `add_weighted_adapter`: "cat" puts the factors side by side (exact; the
ranks add up), "svd" keeps the best rank-r part of that, and "linear" adds factors to factors, A = Σ ±√|wᵢsᵢ| Aᵢ and
B = Σ √|wᵢsᵢ| Bᵢ, whose cross terms are an error (LoRAHub's composition: Huang et al., COLM 2024, arXiv 2307.13269).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rankloom.core import thin as forms
from rankloom.core.attach import attach, check_name
from rankloom.core.bank import Bank
from rankloom.core.plan import Plan
from rankloom.core.site import Site
from rankloom.core.thin import Thin
from rankloom.errors import NotMergeable, SettingsError, suggest
from rankloom.formats.patterns import exactly
from rankloom.formats.peft.reading import exact
from rankloom.formats.peft.targets import our_targets
from rankloom.formats.view import View, view
from rankloom.methods.lora import LoRA
from rankloom.ops.linalg import product_norm, product_svd
from rankloom.settings import Rank, from_data

How = Literal["svd", "linear", "cat"]


@dataclass(frozen=True)
class Combined:
    """The new adapter's `name`; by site its `ranks` and `errors`, ‖Σ wᵢΔWᵢ − ΔW‖_F / ‖Σ wᵢΔWᵢ‖_F; `error`: the same
    over all sites together. "cat" has none but rounding, and states 0.
    """

    name: str
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float


_Slot = tuple[int, str]
_Part = tuple[Site, Thin, float]
"""A site, the factors of the adapter there, and its weight times its scale."""


@dataclass(frozen=True)
class _Parts:
    """Sites whose parts are alike, stacked: of each part the factors (sites, …, r, in) and (sites, …, out, r), and
    weight times scale (sites, 1 …).
    """

    a: list[Tensor]
    b: list[Tensor]
    w: list[Tensor]


@dataclass(frozen=True)
class _Made:
    """New factors, stacked, and two Frobenius norms of each site: of the sum, and of what is lost of it."""

    a: Tensor
    b: Tensor
    size: Tensor
    lost: Tensor


@torch.no_grad()
def combine(bank: Bank, weights: Mapping[str, float], name: str, how: How = "svd", r: int | None = None) -> Combined:
    """Attach the LoRA `name` = Σ weights[i]·i at every site that one of the adapters has; it is not active yet.

    `r`: rank for "svd", by default the largest of the parts. Its scale is 1 (`lora_alpha` = `r`), it has no dropout,
    and it trains, merges and saves as any other. Raises `SettingsError` where "linear" meets different ranks, and
    `NotMergeable` for one that is more than thin factors (a bias after B, DoRA, a router, whole tensors). Nothing
    is attached then.
    """
    _check(weights, how, r)
    check_name(name, bank)
    views = {each: view(bank, each) for each in weights}
    parts = _by_site(views, weights)
    names = {key: at[0][0].name for key, at in parts.items()}
    rank = r or max(thin.A.shape[-2] for at in parts.values() for _, thin, _ in at)
    made: dict[_Slot, tuple[Tensor, Tensor, float, float]] = {}
    for keys in _alike(parts):
        stacked = _stacked([parts[key] for key in keys])
        found = _svd(stacked, rank) if how == "svd" else _linear(stacked) if how == "linear" else _side_by_side(stacked)
        made |= zip(keys, zip(found.a, found.b, found.size.tolist(), found.lost.tolist()))
    ranks = {names[key]: a.shape[-2] for key, (a, *_) in made.items()}
    _attach(bank, name, list(views.values()), ranks)
    for site in bank.sites(name):
        thin = site.adapter.thin(site.base, None)
        assert thin is not None
        a, b, *_ = made[_slot(site)]
        thin.A.copy_(a)
        thin.B.copy_(b)
    norms = {names[key]: (size, lost) for key, (_, _, size, lost) in made.items()}
    errors = {at: lost / size if size else 0.0 for at, (size, lost) in norms.items()}
    whole, lost = (math.hypot(*each) for each in zip(*norms.values()))
    return Combined(name, ranks, errors, lost / whole if whole else 0.0)


def _check(weights: Mapping[str, float], how: str, r: int | None) -> None:
    if not weights:
        raise SettingsError("combine: name the adapters and their weights, as in {'a': 0.7, 'b': 0.3}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise SettingsError(f"combine: {name}={weight!r}: a weight is a finite number")
    if how not in get_args(How):
        raise SettingsError(f"combine: how={how!r}{suggest(how, get_args(How))}")
    if r is not None:
        from_data(Rank, r, "combine.r")
        if how != "svd":
            raise SettingsError(f"combine: r={r} belongs to how='svd'; {how!r} has the rank that its parts give it")


def _by_site(views: Mapping[str, View], weights: Mapping[str, float]) -> dict[_Slot, list[_Part]]:
    """The parts that meet at each site."""
    parts: dict[_Slot, list[_Part]] = {}
    for name, found in views.items():
        for site in found.sites:
            thin = site.adapter.thin(site.base, None)
            if thin is None or thin.magnitude is not None or thin.bias is not None:
                raise NotMergeable(
                    f"combine: adapter {name!r} at {site.name!r} is {type(site.adapter).__name__}, no plain "
                    "factor pair: merge it with weights, or export it as LoRA first"
                )
            a, b = forms.factors(thin)
            parts.setdefault(_slot(site), []).append((site, Thin(a, b), weights[name] * thin.scale))
    return parts


def _slot(site: Site) -> _Slot:
    return id(site.layer), site.slot


def _alike(parts: Mapping[_Slot, list[_Part]]) -> list[list[_Slot]]:
    """Places whose factors have the same shapes, types and devices: they are computed together."""
    found: dict[object, list[_Slot]] = {}
    for key, at in parts.items():
        kind = tuple((t.shape, t.dtype, t.device) for _, thin, _ in at for t in (thin.A, thin.B))
        found.setdefault(kind, []).append(key)
    return list(found.values())


def _stacked(sites: Sequence[Sequence[_Part]]) -> _Parts:
    columns = list(zip(*sites))
    a = [torch.stack([thin.A for _, thin, _ in column]) for column in columns]
    b = [torch.stack([thin.B for _, thin, _ in column]) for column in columns]
    w = [t.new_tensor([w for *_, w in column]).reshape(-1, *(1,) * (t.ndim - 1)) for t, column in zip(a, columns)]
    return _Parts(a, b, w)


def _whole(parts: _Parts) -> tuple[Tensor, Tensor]:
    """[w₁s₁A₁; …] and [B₁ …]: the sum."""
    return torch.cat([w * a for w, a in zip(parts.w, parts.a)], dim=-2), torch.cat(parts.b, dim=-1)


def _side_by_side(parts: _Parts) -> _Made:
    a, b = _whole(parts)
    nothing = torch.zeros(a.shape[0])
    return _Made(a, b, nothing, nothing)


def _svd(parts: _Parts, rank: int) -> _Made:
    """A = √S Vᵀ, B = U √S of the `rank` largest singular values of the sum; zeros where it has fewer."""
    whole_a, whole_b = _whole(parts)
    u, s, vh = product_svd(whole_b, whole_a)
    kept, root = min(rank, s.shape[-1]), s[..., :rank].sqrt()
    a = vh.new_zeros(*vh.shape[:-2], rank, vh.shape[-1])
    b = u.new_zeros(*u.shape[:-1], rank)
    a[..., :kept, :] = root[..., None] * vh[..., :kept, :]
    b[..., :kept] = u[..., :kept] * root[..., None, :]
    return _Made(a, b, _norm(s), _norm(s[..., rank:]))


def _linear(parts: _Parts) -> _Made:
    """A = Σ ±√|wᵢsᵢ| Aᵢ, B = Σ √|wᵢsᵢ| Bᵢ."""
    ranks = [a.shape[-2] for a in parts.a]
    if len(set(ranks)) > 1:
        raise SettingsError(f"combine: how='linear' adds factors of one rank, not of {ranks}; use 'svd' or 'cat'")
    a = torch.stack([w.sign() * w.abs().sqrt() * a for w, a in zip(parts.w, parts.a)]).sum(0)
    b = torch.stack([w.abs().sqrt() * b for w, b in zip(parts.w, parts.b)]).sum(0)
    whole_a, whole_b = _whole(parts)
    off = product_norm(torch.cat([whole_b, b], dim=-1), torch.cat([whole_a, -a], dim=-2))
    return _Made(a, b, _norm(product_norm(whole_b, whole_a)), _norm(off))


def _norm(values: Tensor) -> Tensor:
    """The norm over all but the first dim."""
    norm: Tensor = torch.linalg.vector_norm(values.reshape(values.shape[0], -1), dim=-1)
    return norm


def _attach(bank: Bank, name: str, views: Sequence[View], ranks: Mapping[str, int]) -> None:
    """A LoRA of these ranks and of scale 1 at every site of the views, worded as the first one where that fits."""
    first = views[0].plan
    layers, parameters = (set().union(*found) for found in zip(*map(our_targets, views)))
    r = max(ranks.values())
    varied = {} if set(ranks.values()) == {r} else {exactly(site): rank for site, rank in ranks.items()}
    plan = dataclasses.replace(
        exact(first, sorted(layers), sorted(parameters)),
        method=LoRA(r=r, lora_alpha=float(r)),
        rank_pattern=varied,
        alpha_pattern={site: float(rank) for site, rank in varied.items()},
        rules=(),
        layer_replication=(),
    )
    attach(bank.model, plan, name)
    if (layers, parameters) == our_targets(views[0]):
        bank.plans[name] = _worded(plan, first)


def _worded(plan: Plan, like: Plan) -> Plan:
    kept = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
    return dataclasses.replace(plan, **{k: getattr(like, k) for k in (*kept, "layer_replication")})
