"""Cross entropy on one stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from rankloom.objectives.base import Batch, Objective, answer, cross_entropy, stream


@dataclass(frozen=True)
class SFT(Objective):
    """Mean of −log p over the labels of the stream `train`."""

    train: str = "train"

    def __call__(self, model: nn.Module, streams: Mapping[str, Batch]) -> Tensor:
        batch = stream(streams, self.train)
        return cross_entropy(answer(model, batch), batch["labels"])
