"""Losses that keep routers from sending everything to a few experts.

They read the notes "router" (probabilities (…, n), float32) and, of sparse gates, "experts" (ids (…, k)); tokens that
the batch's "attention_mask" (rows, tokens) leaves out do not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.core.rule import Rule, Run
from rankloom.errors import StateError


@dataclass
class Balance(Rule):
    """loss + weight · Σ over routers of N Σ_i f_i P_i: P_i the mean probability of expert i, f_i its part of all
    choices (of a dense gate: of the strongest). 1 for an even router, N at collapse (Switch, arXiv 2101.03961 eq. 4–6).
    """

    reads: ClassVar[tuple[str, ...]] = ("router", "experts")
    weight: float = 0.01

    def loss(self, run: Run, loss: Tensor) -> Tensor:
        """Add the losses of all routers."""
        found = [n * _dot(_mean(chosen, mask), _mean(soft, mask)) for soft, chosen, mask, n in _routers(run)]
        return loss + self.weight * torch.stack(found).sum().to(loss) if found and self.weight else loss


@dataclass
class SequenceBalance(Rule):
    """loss + weight · mean over rows of Σ_i f_i P_i, f and P over all tokens of a row and all routers together: 1/N
    when even, 1 at collapse (LLaVA-MoLE, arXiv 2401.16160, released code).
    """

    reads: ClassVar[tuple[str, ...]] = ("router", "experts")
    weight: float = 0.01

    def loss(self, run: Run, loss: Tensor) -> Tensor:
        """Add the loss of all routers together."""
        found = list(_routers(run))
        if not found or not self.weight:
            return loss
        if len({n for *_, n in found}) > 1:
            raise StateError(f"sequence_balance: routers have {sorted({n for *_, n in found})} experts, not the same")
        rows = [(_by_row(soft), _by_row(chosen), _by_row(mask)) for soft, chosen, mask, _ in found]
        soft, chosen, mask = (torch.cat(parts, dim=1) for parts in zip(*rows))
        total = mask.sum(1).clamp_min(1)
        even = ((soft * mask).sum(1) / total * ((chosen * mask).sum(1) / total)).sum(-1)
        return loss + self.weight * even.mean().to(loss)


@dataclass
class TypeBalance(Rule):
    """Localized balancing (LoRAMoE, arXiv 2312.09979 eq. 5–7): loss + weight · Σ over routers of Var(Z)/Mean(Z)²,
    Z = Q ∘ I, Q (rows, n) the weights of a row's tokens summed, I = 1 + delta for the first half of the experts where
    the row's type is 1 and for the second where it is 0, else 1 − delta.

    It is least where Q ∝ 1/I: more goes to the experts with the smaller coefficient. Types come from the batch's column
    "task_types" (rows,); without it nothing is added. `delta=0` is CV² of the rows' importance.
    """

    reads: ClassVar[tuple[str, ...]] = ("router",)
    weight: float = 0.1
    delta: float = 0.1

    def loss(self, run: Run, loss: Tensor) -> Tensor:
        """Add the losses of all routers."""
        types = run.batch.get("task_types") if isinstance(run.batch, Mapping) else None
        if types is None or not self.weight:
            return loss
        found = [self._local(_by_row(soft * mask).sum(1), types) for soft, _, mask, _ in _routers(run)]
        return loss + self.weight * torch.stack(found).sum().to(loss) if found else loss

    def _local(self, importance: Tensor, types: Any) -> Tensor:
        rows, n = importance.shape
        types = torch.as_tensor(types, device=importance.device)
        if types.shape != (rows,) or n % 2:
            raise StateError(
                f"type_balance: types of shape {tuple(types.shape)} for {rows} rows and {n} experts: one type for each "
                "row, and an even number of experts"
            )
        first = torch.arange(n, device=importance.device) < n // 2
        z = importance * torch.where(first == (types[:, None] == 1), 1 + self.delta, 1 - self.delta)
        return z.new_zeros(()) if z.numel() == 1 else z.var() / (z.mean().square() + 1e-10)


def _routers(run: Run) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """(probabilities (…, n), parts of the choices (…, n), mask (…, 1), n) of every router in this pass."""
    found = []
    for site, soft in run.notes["router"].items():
        n = soft.shape[-1]
        ids = run.notes["experts"].get(site)
        ids = soft.argmax(-1, keepdim=True) if ids is None else ids
        chosen = F.one_hot(ids, n).to(soft).mean(-2)
        found.append((soft, chosen, _mask(run.batch, soft, site), n))
    return found


def _mask(batch: Any, soft: Tensor, site: str) -> Tensor:
    """1 (…, 1) for tokens that count."""
    given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if given is None or soft.ndim < 2:
        return torch.ones_like(soft[..., :1])
    if given.numel() == soft[..., 0].numel():
        kept: Tensor = given.reshape(soft.shape[:-1]).to(soft)[..., None]
        return kept
    if given.shape[:1] == soft.shape[:1] and soft.ndim == 2:
        return torch.ones_like(soft[..., :1])
    raise StateError(
        f"the router at {site!r} weighs {tuple(soft.shape[:-1])} tokens, and the batch's attention_mask is "
        f"{tuple(given.shape)}: padding cannot be told from the rest"
    )


def _by_row(tokens: Tensor) -> Tensor:
    """(rows, tokens, n) of (rows, …, n)."""
    return tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean (n,) over the tokens that count."""
    return (tokens * mask).flatten(0, -2).sum(0) / mask.sum().clamp_min(1)


def _dot(one: Tensor, two: Tensor) -> Tensor:
    return (one * two).sum()
