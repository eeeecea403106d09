"""Losses over preferences: a chosen and a rejected answer (`chosen_…`, `rejected_…` columns), or single answers that
are desirable or not.

ℓ(a) is the sum of log p over the labels of an answer, ℓ̄ its mean, ref the base's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.errors import SettingsError
from rankloom.objectives.base import Batch, Objective, answer, cross_entropy, log_probs, part, stream
from rankloom.objectives.reference import Cache, base_answers
from rankloom.settings import NotNegative, Positive


def totals(model: nn.Module, batch: Batch) -> Tensor:
    """ℓ of each row (batch,)."""
    return log_probs(answer(model, batch), batch["labels"])


@dataclass(frozen=True)
class DPO(Objective):
    """−log σ(β[(ℓ_c − ref_c) − (ℓ_r − ref_r)]), mean over pairs. Rafailov et al., NeurIPS 2023, arXiv 2305.18290 eq. 7.

    `keep`: the base is asked once for each batch.
    """

    beta: Positive = 0.1
    keep: bool = False
    pairs: str = "pairs"
    _answers: Cache = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, model: nn.Module, streams: Mapping[str, Batch]) -> Tensor:
        batch = stream(streams, self.pairs)
        margins = [totals(model, part(batch, name)) for name in ("chosen", "rejected")]
        kept = self._answers if self.keep else None
        base = [base_answers(model, part(batch, name), totals, kept) for name in ("chosen", "rejected")]
        logits = self.beta * ((margins[0] - margins[1]) - (base[0] - base[1]))
        return -F.logsigmoid(logits).mean()


@dataclass(frozen=True)
class ORPO(Objective):
    """Cross entropy of the chosen answers − β log σ(log odds ratio), odds of exp ℓ̄; no base is needed.
    Hong et al., EMNLP 2024, arXiv 2403.07691 eq. 6–7.
    """

    beta: Positive = 0.1
    pairs: str = "pairs"

    def __call__(self, model: nn.Module, streams: Mapping[str, Batch]) -> Tensor:
        batch = stream(streams, self.pairs)
        chosen, rejected = part(batch, "chosen"), part(batch, "rejected")
        logits = answer(model, chosen)
        good = log_probs(logits, chosen["labels"], mean=True)
        bad = log_probs(answer(model, rejected), rejected["labels"], mean=True)
        return cross_entropy(logits, chosen["labels"]) - self.beta * F.logsigmoid(log_odds(good) - log_odds(bad)).mean()


def log_odds(logs: Tensor) -> Tensor:
    """log p/(1 − p) of log p."""
    return logs - torch.log1p(-logs.exp())


@dataclass(frozen=True)
class SimPO(Objective):
    """−log σ(β(ℓ̄_c − ℓ̄_r) − γ), mean over pairs; no base is needed.

    Meng et al., NeurIPS 2024, arXiv 2405.14734 eq. 6.
    """

    beta: Positive = 2.0
    gamma: float = 0.5
    pairs: str = "pairs"

    def __call__(self, model: nn.Module, streams: Mapping[str, Batch]) -> Tensor:
        batch = stream(streams, self.pairs)
        each = [part(batch, name) for name in ("chosen", "rejected")]
        good, bad = (log_probs(answer(model, one), one["labels"], mean=True) for one in each)
        return -F.logsigmoid(self.beta * (good - bad) - self.gamma).mean()


@dataclass(frozen=True)
class KTO(Objective):
    """1 − σ(β(r − z)) for desirable answers and 1 − σ(β(z − r)) for others, r = ℓ − ref, mean over the batch.

    Columns of the stream: `input_ids`, `labels`, `desirable` (batch,) of bool, and `kl_…` of answers to other prompts,
    from which z = max(0, mean(ℓ − ref)) is estimated, without gradients (`kl=False`: z = 0). Ethayarajh et al., ICML
    2024, arXiv 2402.01306 eq. 8. `keep`: the base is asked once for each batch.
    """

    beta: Positive = 0.1
    desirable_weight: NotNegative = 1.0
    undesirable_weight: NotNegative = 1.0
    kl: bool = True
    keep: bool = False
    answers: str = "answers"
    _answers: Cache = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, model: nn.Module, streams: Mapping[str, Batch]) -> Tensor:
        batch = stream(streams, self.answers)
        if "desirable" not in batch:
            raise SettingsError(f"KTO: the batch has no column 'desirable'; it has {', '.join(map(repr, batch))}")
        own = {k: v for k, v in batch.items() if k != "desirable" and not k.startswith("kl_")}
        ratio = self._ratio(model, own)
        good = batch["desirable"].to(ratio.device, torch.bool)
        level = ratio.new_zeros(())
        if self.kl:
            with torch.no_grad():
                level = self._ratio(model, part(batch, "kl")).mean().clamp(min=0)
        losses = torch.where(
            good,
            self.desirable_weight * (1 - torch.sigmoid(self.beta * (ratio - level))),
            self.undesirable_weight * (1 - torch.sigmoid(self.beta * (level - ratio))),
        )
        return losses.mean()

    def _ratio(self, model: nn.Module, batch: Batch) -> Tensor:
        return totals(model, batch) - base_answers(model, batch, totals, self._answers if self.keep else None)
