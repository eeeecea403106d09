"""LoRA arithmetic: a new adapter that is a weighted sum of others, ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ, and no ΔW is ever built.

"cat", "svd" and "linear" are the ways of PEFT's `add_weighted_adapter`: "cat" puts the factors side by side (exact; the
ranks add up), "svd" keeps the best rank-r part of that, and "linear" adds factors to factors, A = Σ ±√|wᵢsᵢ| Aᵢ and
B = Σ √|wᵢsᵢ| Bᵢ. "factor" is LoRAHub's composition (Huang et al., COLM 2024, arXiv 2307.13269): A = Σ wᵢ√|sᵢ| Aᵢ,
B = Σ ±wᵢ√|sᵢ| Bᵢ. The cross terms of the last two are stated as an error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rankloom.core import thin as forms
from rankloom.core.attach import attach, check_name
from rankloom.core.bank import Bank
from rankloom.core.plan import PATTERNS
from rankloom.errors import NotMergeable, SettingsError, suggest
from rankloom.formats.patterns import exactly
from rankloom.methods.lora import LoRA, LoRAAdapter
from rankloom.ops.linalg import product_norm, product_svd
from rankloom.settings import Rank, from_data

How = Literal["svd", "linear", "cat", "factor"]


@dataclass(frozen=True)
class Combined:
    """The new adapter's `name`; by site its `ranks` and `errors`, ‖Σ wᵢΔWᵢ − ΔW‖_F / ‖Σ wᵢΔWᵢ‖_F; `error`: the same
    over all sites together. "cat" has none but rounding, and states 0.
    """

    name: str
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float


class Part(NamedTuple):
    """One change of a site: weight · scale · B A, A (…, r, in), B (…, out, r)."""

    a: Tensor
    b: Tensor
    weight: float
    scale: float


class Sum(NamedTuple):
    """What is made of the parts of a site: A (…, r, in) and B (…, out, r) of scale 1; Frobenius norms of the parts' sum
    and of what is lost of it.
    """

    a: Tensor
    b: Tensor
    size: float
    lost: float


@dataclass(frozen=True)
class _Parts:
    """Sites whose parts are alike, stacked: of each part the factors (sites, …, r, in) and (sites, …, out, r), and
    weights and scales (sites, 1 …).
    """

    a: list[Tensor]
    b: list[Tensor]
    weights: list[Tensor]
    scales: list[Tensor]

    @property
    def w(self) -> list[Tensor]:
        """Weight times scale."""
        return [w * s for w, s in zip(self.weights, self.scales)]


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
    and it trains, merges and saves as any other. Raises `SettingsError` where "linear" or "factor" meets different
    ranks, and `NotMergeable` for one that is more than thin factors (a bias after B, DoRA, a router, whole tensors).
    Nothing is attached then.
    """
    _check(weights, how, r)
    check_name(name, bank)
    parts = parts_of(bank, weights)
    made = summed(parts, how, r or max(part.a.shape[-2] for at in parts.values() for part in at))
    place(bank, name, {at: (found.a, found.b) for at, found in made.items()}, next(iter(weights)))
    ranks = {at: found.a.shape[-2] for at, found in made.items()}
    errors = {at: found.lost / found.size if found.size else 0.0 for at, found in made.items()}
    return Combined(name, ranks, errors, overall(made.values()))


def parts_of(bank: Bank, weights: Mapping[str, float]) -> dict[str, list[Part]]:
    """The thin parts of the adapters that meet at each site, by its name. Raises `NotMergeable` for any other."""
    parts: dict[str, list[Part]] = {}
    for name, weight in weights.items():
        for site in bank.sites(name):
            thin = site.adapter.thin(site.base, None)
            if thin is None or thin.magnitude is not None or thin.bias is not None:
                raise NotMergeable(
                    f"combine: adapter {name!r} at {site.name!r} is {type(site.adapter).__name__}, no plain "
                    "factor pair: merge it with weights, or export it as LoRA first"
                )
            parts.setdefault(site.name, []).append(Part(*forms.factors(thin), weight, thin.scale))
    return parts


def summed(parts: Mapping[str, Sequence[Part]], how: How, r: int) -> dict[str, Sum]:
    """The sum of each site's parts as one pair; `r`: rank that "svd" keeps."""
    made: dict[str, Sum] = {}
    for keys in _alike(parts):
        stacked = _stacked([parts[key] for key in keys])
        found = _svd(stacked, r) if how == "svd" else _HOW[how](stacked)
        made |= {k: Sum(*each) for k, *each in zip(keys, found.a, found.b, found.size.tolist(), found.lost.tolist())}
    return {key: made[key] for key in parts}


def overall(made: Iterable[Sum]) -> float:
    """What is lost of all sites together, relative to all of them."""
    sizes, lost = zip(*((each.size, each.lost) for each in made))
    whole = math.hypot(*sizes)
    return math.hypot(*lost) / whole if whole else 0.0


@torch.no_grad()
def place(
    bank: Bank, name: str, factors: Mapping[str, tuple[Tensor, Tensor]], like: str, *, lora_bias: bool = False
) -> None:
    """Attach a LoRA of scale 1 with these factors at these sites; all else, and the wording where the sites are the
    same, is that of the plan of `like`. A base that a start has made stays as it is.
    """
    first = bank.plans[like]
    ranks = {at: int(a.shape[-2]) for at, (a, _) in factors.items()}
    r = max(ranks.values())
    varied = {} if set(ranks.values()) == {r} else {exactly(at): rank for at, rank in ranks.items()}
    made: dict[str, Any] = {} if first.start is None else {"store": None, "store_skip_modules": (), "start": None}
    plan = dataclasses.replace(
        first,
        **PATTERNS,
        **made,
        method=LoRA(r=r, lora_alpha=float(r), lora_bias=lora_bias),
        sites=tuple(factors),
        rank_pattern=varied,
        alpha_pattern={at: float(rank) for at, rank in varied.items()},
        rules=(),
        layer_replication=(),
    )
    attach(bank.model, plan, name)
    for site in bank.sites(name):
        if site.name in factors:
            pair = next(m for m in site.adapter.modules() if isinstance(m, LoRAAdapter))
            for mine, value in zip((pair.A, pair.B), factors[site.name]):
                mine.copy_(value)
    if set(factors) == set(bank.adapted(like)):
        kept = (*PATTERNS, "sites", "layer_replication")
        bank.plans[name] = dataclasses.replace(plan, **{k: getattr(first, k) for k in kept})


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


def _alike(parts: Mapping[str, Sequence[Part]]) -> list[list[str]]:
    """Sites whose factors have the same shapes, types and devices: they are computed together."""
    found: dict[object, list[str]] = {}
    for key, at in parts.items():
        kind = tuple((t.shape, t.dtype, t.device) for part in at for t in (part.a, part.b))
        found.setdefault(kind, []).append(key)
    return list(found.values())


def _stacked(sites: Sequence[Sequence[Part]]) -> _Parts:
    columns = list(zip(*sites))
    a, b = ([torch.stack([getattr(p, k) for p in column]) for column in columns] for k in ("a", "b"))
    weights, scales = (
        [t.new_tensor([getattr(p, k) for p in c]).reshape(-1, *(1,) * (t.ndim - 1)) for t, c in zip(a, columns)]
        for k in ("weight", "scale")
    )
    return _Parts(a, b, weights, scales)


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
    roots = [w.abs().sqrt() for w in parts.w]
    return _added(parts, [w.sign() * root for w, root in zip(parts.w, roots)], roots, "linear")


def _factor(parts: _Parts) -> _Made:
    """A = Σ wᵢ√|sᵢ| Aᵢ, B = Σ ±wᵢ√|sᵢ| Bᵢ."""
    roots = [w * s.abs().sqrt() for w, s in zip(parts.weights, parts.scales)]
    return _added(parts, roots, [s.sign() * root for s, root in zip(parts.scales, roots)], "factor")


def _added(parts: _Parts, of_a: Sequence[Tensor], of_b: Sequence[Tensor], how: str) -> _Made:
    """Σ Aᵢ and Σ Bᵢ with these weights, and the norm of the cross terms."""
    ranks = [a.shape[-2] for a in parts.a]
    if len(set(ranks)) > 1:
        raise SettingsError(f"combine: how={how!r} adds factors of one rank, not of {ranks}; use 'svd' or 'cat'")
    a = torch.stack([w * a for w, a in zip(of_a, parts.a)]).sum(0)
    b = torch.stack([w * b for w, b in zip(of_b, parts.b)]).sum(0)
    whole_a, whole_b = _whole(parts)
    off = product_norm(torch.cat([whole_b, b], dim=-1), torch.cat([whole_a, -a], dim=-2))
    return _Made(a, b, _norm(product_norm(whole_b, whole_a)), _norm(off))


def _norm(values: Tensor) -> Tensor:
    """The norm over all but the first dim."""
    norm: Tensor = torch.linalg.vector_norm(values.reshape(values.shape[0], -1), dim=-1)
    return norm


_HOW: Mapping[str, Callable[[_Parts], _Made]] = {"cat": _side_by_side, "linear": _linear, "factor": _factor}
