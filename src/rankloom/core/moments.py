"""An optimizer's memory of tensors that start anew: forgotten, or pruned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from rankloom.errors import SettingsError
from rankloom.settings import Settings, Within

Part = Annotated[float, Within(0, 1)]
"""From 0 to 1."""


@dataclass(frozen=True)
class Forget(Settings):
    """`how`: "zero" drops all of a tensor's state, step count included; "random" and "magnitude" set the part `p` of
    each moment to zero, drawn at random or the smallest ones, and keep the rest (ReLoRA, arXiv 2307.05695 §3).
    """

    how: Literal["zero", "random", "magnitude"] = "zero"
    p: Part = 0.999


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], how: Forget) -> None:
    """Forget what the optimizer knows of these tensors and of no other.

    Raises `SettingsError` where moments that are to be pruned are kept in 8 bits.
    """
    flush = getattr(optimizer, "flush", None)
    if callable(flush):
        flush()
    known = [p for p in parameters if p in optimizer.state]
    if how.how == "zero":
        for parameter in known:
            del optimizer.state[parameter]
        return
    moments = [(p, m) for p in known for m in optimizer.state[p].values() if isinstance(m, Tensor) and m.ndim]
    for parameter, moment in moments:
        if moment.shape != parameter.shape or not moment.is_floating_point():
            raise SettingsError(
                f"{type(optimizer).__name__} keeps moments in few bits: they cannot be pruned; use how='zero'"
            )
    for _, moment in moments:
        moment.mul_(survivors(moment, how))


def survivors(moment: Tensor, how: Forget) -> Tensor:
    """A mask of the moment's shape: round(p·n) of its n numbers are False."""
    score = moment.abs() if how.how == "magnitude" else torch.rand_like(moment, dtype=torch.float32)
    mask = torch.ones(moment.numel(), dtype=torch.bool, device=moment.device)
    mask[score.flatten().argsort()[: round(how.p * moment.numel())]] = False
    return mask.reshape(moment.shape)
