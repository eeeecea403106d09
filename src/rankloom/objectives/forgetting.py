"""Losses that unlearn the stream `forget`, with `retain_weight` times the cross entropy of the stream `retain`.

`retain=None`: there is no such stream.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.objectives.base import IGNORED, Batch, Objective, answer, cross_entropy, stream
from rankloom.objectives.preference import totals
from rankloom.objectives.reference import Cache, base_answers
from rankloom.objectives.sft import SFT
from rankloom.settings import NotNegative, Positive


@dataclass(frozen=True)
class Forgetting(Objective):
    """Loss on `forget` + `retain_weight` · cross entropy on `retain`."""

    retain_weight: NotNegative = 1.0
    forget: str = "forget"
    retain: str | None = "retain"

    def __call__(self, model: nn.Module, streams: Mapping[str, Batch]) -> Tensor:
        loss = self.forgetting(model, stream(streams, self.forget))
        return loss if self.retain is None else loss + self.retain_weight * SFT(self.retain)(model, streams)

    @abstractmethod
    def forgetting(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss on what is to be forgotten, 0-d."""


@dataclass(frozen=True)
class GradientAscent(Forgetting):
    """Minus the cross entropy of what is to be forgotten: without bound. Jang et al., ACL 2023, arXiv 2210.01504."""

    def forgetting(self, model: nn.Module, batch: Batch) -> Tensor:
        return -cross_entropy(answer(model, batch), batch["labels"])


@dataclass(frozen=True)
class NPO(Forgetting):
    """−(2/β) log σ(−β(ℓ − ref)), mean over rows: ascent that fades where the model has left the base's answers.

    Zhang et al., COLM 2024, arXiv 2404.05868 eq. 3. `keep`: the base is asked once for each batch.
    """

    beta: Positive = 0.1
    keep: bool = False
    _answers: Cache = field(default_factory=dict, init=False, repr=False, compare=False)

    def forgetting(self, model: nn.Module, batch: Batch) -> Tensor:
        ratio = totals(model, batch) - base_answers(model, batch, totals, self._answers if self.keep else None)
        return -2 / self.beta * F.logsigmoid(-self.beta * ratio).mean()


@dataclass(frozen=True)
class InvertedHinge(Forgetting):
    """1 + p(label) − max over other tokens of p, mean over labels: only the label and its nearest rival move.

    Cha et al., ICLR 2025, arXiv 2408.06621 eq. 3.
    """

    def forgetting(self, model: nn.Module, batch: Batch) -> Tensor:
        labels = batch["labels"][:, 1:]
        picked = labels != IGNORED
        p = answer(model, batch)[:, :-1][picked].float().softmax(-1)
        index = labels[picked][:, None]
        own = p.gather(-1, index).squeeze(-1)
        rival = p.scatter(-1, index, torch.zeros_like(index, dtype=p.dtype)).amax(-1)
        return (1 + own - rival).sum() / max(own.numel(), 1)
