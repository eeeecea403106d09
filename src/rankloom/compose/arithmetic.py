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

from rankloom.core.adapter import Thin
from rankloom.core.attach import attach, check_name
from rankloom.core.bank import Bank, Fitted
from rankloom.core.plan import Plan
from rankloom.errors import NotMergeable, SettingsError, suggest
from rankloom.formats.patterns import exactly
from rankloom.formats.peft.reading import exact
from rankloom.formats.peft.targets import our_targets
from rankloom.formats.view import View, view
from rankloom.methods.lora import LoRA, check_rank
from rankloom.ops.linalg import product_norm, product_svd

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


@dataclass(frozen=True)
class _Pair:
    """A (…, r, in) and B (…, out, r) of a new site, and two Frobenius norms: of the sum, and of what is lost of it."""

    a: Tensor
    b: Tensor
    size: float = 0.0
    lost: float = 0.0


@torch.no_grad()
def combine(bank: Bank, weights: Mapping[str, float], name: str, how: How = "svd", r: int | None = None) -> Combined:
    """Attach the LoRA `name` = Σ weights[i]·i at every site that one of the adapters has; it does not speak yet.

    `r`: rank for "svd", by default the largest of the parts. Its scale is 1 (`lora_alpha` = `r`), it has no dropout,
    and it trains, merges and saves as any other. Raises `SettingsError` where "linear" meets different ranks, and
    `NotMergeable` for an adapter that is more than factor pairs (a bias after B, DoRA, tensors trained whole); nothing
    is attached then.
    """
    _check(weights, how, r)
    check_name(name, bank)
    views = {each: view(bank, each) for each in weights}
    parts = _by_place(views, weights)
    largest = max(thin.a.shape[-2] for found in parts.values() for _, thin, _ in found)
    ways = {"svd": lambda f: _svd(f, r or largest), "linear": lambda f: [_linear(p) for p in f], "cat": _cat}
    pairs: dict[tuple[int, str], _Pair] = {}
    for keys in _alike(parts):
        pairs |= zip(keys, ways[how]([parts[key] for key in keys]))
    ranks = {parts[key][0][0].site.name: pair.a.shape[-2] for key, pair in pairs.items()}
    _attach(bank, name, list(views.values()), ranks)
    for fitted in bank.fitted(name):
        pair, made = pairs[_place(fitted)], fitted.adapter.thin()
        assert made is not None
        made.a.copy_(pair.a)
        made.b.copy_(pair.b)
    errors = {parts[key][0][0].site.name: p.lost / p.size if p.size else 0.0 for key, p in pairs.items()}
    whole = math.hypot(*(p.size for p in pairs.values()))
    return Combined(name, ranks, errors, math.hypot(*(p.lost for p in pairs.values())) / whole if whole else 0.0)


_Part = tuple[Fitted, Thin, float]
"""An adapter in its place, its factors, and its weight times its scale."""


def _check(weights: Mapping[str, float], how: str, r: int | None) -> None:
    if not weights:
        raise SettingsError("combine: name the adapters and their weights, as in {'a': 0.7, 'b': 0.3}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise SettingsError(f"combine: {name}={weight!r}: a weight is a finite number")
    if how not in get_args(How):
        raise SettingsError(f"combine: how={how!r}{suggest(how, get_args(How))}")
    if r is not None:
        check_rank(r)
        if how != "svd":
            raise SettingsError(f"combine: r={r} belongs to how='svd'; {how!r} has the rank that its parts give it")


def _by_place(views: Mapping[str, View], weights: Mapping[str, float]) -> dict[tuple[int, str], list[_Part]]:
    """The parts that meet at each place."""
    parts: dict[tuple[int, str], list[_Part]] = {}
    for name, found in views.items():
        for fitted in found.fitted:
            thin = fitted.adapter.thin()
            if thin is None:
                raise NotMergeable(
                    f"combine: adapter {name!r} at {fitted.site.name!r} is {type(fitted.adapter).__name__}, no plain "
                    "factor pair: merge it with weights, or export it as LoRA first"
                )
            parts.setdefault(_place(fitted), []).append((fitted, thin, weights[name] * thin.scale))
    return parts


def _place(fitted: Fitted) -> tuple[int, str]:
    return id(fitted.place.layer), fitted.place.slot


def _alike(parts: Mapping[tuple[int, str], list[_Part]]) -> list[list[tuple[int, str]]]:
    """Places whose factors have the same shapes, types and devices: they are computed together."""
    found: dict[object, list[tuple[int, str]]] = {}
    for key, at in parts.items():
        kind = tuple((t.shape, t.dtype, t.device) for _, thin, _ in at for t in (thin.a, thin.b))
        found.setdefault(kind, []).append(key)
    return list(found.values())


def _cat(places: Sequence[Sequence[_Part]]) -> list[_Pair]:
    """[w₁s₁A₁; …] and [B₁ …], the whole sum."""
    return [
        _Pair(torch.cat([w * t.a for _, t, w in at], dim=-2), torch.cat([t.b for _, t, _ in at], dim=-1))
        for at in places
    ]


def _svd(places: Sequence[Sequence[_Part]], rank: int) -> list[_Pair]:
    """A = √S Vᵀ, B = U √S of the `rank` largest singular values of the sum; zeros where it has fewer."""
    whole = _cat(places)
    u, s, vh = product_svd(torch.stack([p.b for p in whole]), torch.stack([p.a for p in whole]))
    kept, root = min(rank, s.shape[-1]), s[..., :rank].sqrt()
    a = vh.new_zeros(*vh.shape[:-2], rank, vh.shape[-1])
    b = u.new_zeros(*u.shape[:-1], rank)
    a[..., :kept, :] = root[..., None] * vh[..., :kept, :]
    b[..., :kept] = u[..., :kept] * root[..., None, :]
    sizes, lost = (torch.linalg.vector_norm(part.flatten(1), dim=-1).tolist() for part in (s, s[..., rank:]))
    return [_Pair(*each) for each in zip(a, b, sizes, lost)]


def _linear(at: Sequence[_Part]) -> _Pair:
    """A = Σ ±√|wᵢsᵢ| Aᵢ, B = Σ √|wᵢsᵢ| Bᵢ."""
    ranks = [thin.a.shape[-2] for _, thin, _ in at]
    if len(set(ranks)) > 1:
        raise SettingsError(
            f"combine: how='linear' adds factors of one rank; at {at[0][0].site.name!r} there are {ranks}: "
            "use 'svd' or 'cat'"
        )
    a = sum((math.copysign(math.sqrt(abs(w)), w) * t.a for _, t, w in at), torch.zeros_like(at[0][1].a))
    b = sum((math.sqrt(abs(w)) * t.b for _, t, w in at), torch.zeros_like(at[0][1].b))
    (whole,) = _cat([at])
    off_a, off_b = torch.cat([whole.a, -a], dim=-2), torch.cat([whole.b, b], dim=-1)
    return _Pair(a, b, product_norm(whole.b, whole.a), product_norm(off_b, off_a))


def _attach(bank: Bank, name: str, views: Sequence[View], ranks: Mapping[str, int]) -> None:
    """A LoRA of these ranks and of scale 1 at every place of the views, worded as the first one where that fits."""
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
