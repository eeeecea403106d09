"""DyLoRA: one LoRA pair that works at every rank up to r, trained by sampling the rank.

ΔW_b = s_b·B[:, :b] A[:b], s_b = lora_alpha/b. In a step at rank b the rows below b act, and with `frozen` only the
last of them learns. Valipour et al., EACL 2023, arXiv 2210.07558 §4; the released code's scale √(r/b) for each factor
gives lora_alpha/b in all.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from rankloom.core.bank import Bank
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.rule import Rule
from rankloom.core.site import Site
from rankloom.core.thin import Thin
from rankloom.errors import SettingsError
from rankloom.rules.sampling import Distribution, Elastic, RankSampling, probabilities
from rankloom.settings import Count, Probability, Rank, Seed
from rankloom.starts.plain import NONZERO, Factors, check_start, fill

Scaling = Literal["alpha/b", "alpha/sqrt(rb)", "alpha/r"]


@dataclass(frozen=True)
class DyLoRA(Method):
    """`r`: the largest rank; `rank_distribution`: how ranks are drawn ("uniform", "geometric", or a chance for each);
    `frozen`: only the last block of rows of the drawn rank learns; `unit`: rows in a block; `scaling`: the scale at
    rank b, "alpha/sqrt(rb)" being that of kohya's scripts; `seed`: of the draws.

    A scale that falls with b shrinks what lower ranks have learned, so ranks compete; with "alpha/r" every rank can
    reach the best truncation of what the largest can express.
    """

    r: Rank = 8
    lora_alpha: float = 16.0
    lora_dropout: Probability = 0.0
    init_lora_weights: str = "kaiming"
    rank_distribution: Distribution = "uniform"
    frozen: bool = True
    unit: Count = 1
    scaling: Scaling = "alpha/b"
    seed: Seed = 0

    examples: ClassVar = {"init_lora_weights": ("gaussian", "orthogonal")}

    def __post_init__(self) -> None:
        check_start(self.init_lora_weights)
        if self.init_lora_weights in NONZERO:
            raise SettingsError(
                f"init_lora_weights={self.init_lora_weights!r} is not zero at the start, and here it would be another "
                "change at every rank; use 'kaiming', 'gaussian', 'orthogonal' or 'svd'"
            )
        if self.r % self.unit:
            raise SettingsError(f"unit={self.unit}: r={self.r} is cut into blocks of that size, so it must divide r")
        if isinstance(self.rank_distribution, str):
            probabilities(self.rank_distribution, self.r // self.unit)

    def build(self, site: Site) -> DyLoRAAdapter:
        """DyLoRA of one site."""
        site.needs_matrix("dylora")
        return DyLoRAAdapter(site, self)

    def rules(self) -> list[Rule]:
        """The sampling of ranks."""
        return [RankSampling(self.rank_distribution, self.seed)]


class DyLoRAAdapter(Elastic):
    """A (…, r, in), B (…, out, r); active at `rank`, and in a training at the rank that its step drew."""

    roles = {"A": "in", "B": "out"}
    peft_names = {"A": "lora_A.weight", "B": "lora_B.weight"}

    def __init__(self, site: Site, method: DyLoRA) -> None:
        super().__init__(site.name)
        self.r, self.unit, self.frozen = method.r, method.unit, method.frozen
        self.alpha, self.rule = method.lora_alpha, method.scaling
        self.start = method.init_lora_weights
        self.dropout = method.lora_dropout
        self.rank = method.r
        self.sampled: int | None = None
        self.A = site.empty(method.r, site.in_)
        self.B = site.empty(site.out, method.r)

    def extra_repr(self) -> str:
        return f"r={self.r}, rank={self.rank}, scaling={self.scaling:g}"

    @property
    def now(self) -> int:
        """The rank that is in use."""
        return self.sampled if self.sampled is not None and self.training else self.rank

    @property
    def scaling(self) -> float:
        """The scale at the rank that is in use."""
        return scale_at(self.alpha, self.r, self.now, self.rule)

    def sample(self, rank: int | None) -> None:
        self.sampled = rank

    def learning(self) -> slice:
        return slice(self.now - self.unit if self.frozen else 0, self.now)

    def reset(self, base: Base) -> None:
        fill(self.start, cast(Factors, self), base)

    def thin(self, base: Base, x: Any) -> Thin:
        a, b = self._factors()
        return Thin(a, b, self.scaling, dropout=self.dropout if self.training else 0.0)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A[:b], B[:, :b]; rows that may not learn in this step are cut out of the graph."""
        a, b = self.A[..., : self.now, :], self.B[..., : self.now]
        kept = self.learning().start
        if self.sampled is None or not self.training or not kept:
            return a, b
        a = torch.cat([a[..., :kept, :].detach(), a[..., kept:, :]], dim=-2)
        return a, torch.cat([b[..., :kept].detach(), b[..., kept:]], dim=-1)


def scale_at(alpha: float, r: int, rank: int, scaling: Scaling) -> float:
    """alpha/b, alpha/√(r·b) or alpha/r."""
    return alpha / {"alpha/b": rank, "alpha/sqrt(rb)": math.sqrt(r * rank), "alpha/r": r}[scaling]


def set_rank(bank: Bank, rank: int, name: str = "default") -> None:
    """Let every DyLoRA site of the adapter act, and merge, at `rank`; sites of a lower r at all of theirs."""
    found = _sites(bank, name)
    _check(rank, found)
    for adapter in found:
        adapter.rank = min(rank, adapter.r)


@torch.no_grad()
def truncate(bank: Bank, rank: int, name: str = "default") -> None:
    """Cut the adapter down to `rank` for good, in its tensors and in its plan: it acts as `set_rank` let it.

    Optimizers that hold the old tensors are of no more use. Raises `SettingsError` where sites differ in r.
    """
    found = _sites(bank, name)
    _check(rank, found)
    plan, r = bank.plans[name], found[0].r
    if any(adapter.r != r for adapter in found):
        raise SettingsError(
            f"truncate: rank_pattern={dict(plan.rank_pattern)} gives sites different ranks; use set_rank"
        )
    for adapter in found:
        factor = scale_at(1.0, r, rank, adapter.rule) * rank
        adapter.alpha, adapter.r, adapter.rank = adapter.alpha * factor, rank, rank
        adapter.A = nn.Parameter(adapter.A[..., :rank, :].clone(), requires_grad=adapter.A.requires_grad)
        adapter.B = nn.Parameter(adapter.B[..., :rank].clone(), requires_grad=adapter.B.requires_grad)
    method = _inside(plan.method)
    factor = scale_at(1.0, r, rank, method.scaling) * rank
    shorter: dict[str, Any] = {"r": rank, "lora_alpha": method.lora_alpha * factor}
    if not isinstance(method.rank_distribution, str):
        shorter["rank_distribution"] = "uniform"
    bank.plans[name] = dataclasses.replace(
        plan,
        method=plan.method.override(**shorter),
        rank_pattern={},
        alpha_pattern={k: v * factor for k, v in plan.alpha_pattern.items()},
    )


def _sites(bank: Bank, name: str) -> list[DyLoRAAdapter]:
    found = [a for _, a in bank.adapters(name, of=DyLoRAAdapter) if isinstance(a, DyLoRAAdapter)]
    if not found:
        raise SettingsError(
            f"adapter {name!r} is {type(bank.plans[name].method).__name__}: only DyLoRA has a rank to set"
        )
    return found


def _check(rank: int, found: list[DyLoRAAdapter]) -> None:
    largest, unit = max(a.r for a in found), max(a.unit for a in found)
    if not 1 <= rank <= largest or rank % unit:
        raise SettingsError(f"rank={rank}: a multiple of {unit} from {unit} to {largest}")


def _inside(method: Method) -> DyLoRA:
    """The DyLoRA in a method or its combinators."""
    if isinstance(method, DyLoRA):
        return method
    return next(_inside(inner) for inner in method.inner_methods())
