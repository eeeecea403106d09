"""Staying near the base's own answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.objectives.base import IGNORED, Batch, Objective, answer, stream
from rankloom.objectives.reference import Cache, base_answers
from rankloom.settings import Positive


@dataclass(frozen=True)
class Distillation(Objective):
    """T² KL(base ‖ model) of the next-token distributions at temperature T, mean over the labels of the stream.

    Hinton et al. 2015, arXiv 1503.02531 §2. `keep`: the base is asked once for each batch, all its logits are kept.
    """

    temperature: Positive = 1.0
    keep: bool = False
    train: str = "train"
    _answers: Cache = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, model: nn.Module, streams: Mapping[str, Batch]) -> Tensor:
        batch = stream(streams, self.train)
        picked = batch["labels"][:, 1:] != IGNORED
        mine = self._logs(answer(model, batch), picked)
        base = self._logs(base_answers(model, batch, answer, self._answers if self.keep else None), picked)
        return self.temperature**2 * F.kl_div(mine, base, log_target=True, reduction="sum") / max(len(mine), 1)

    def _logs(self, logits: Tensor, picked: Tensor) -> Tensor:
        return (logits[:, :-1][picked].float() / self.temperature).log_softmax(-1)
