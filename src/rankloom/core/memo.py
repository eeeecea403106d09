"""What a grafted layer has learnt while running."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.known import Known
from rankloom.core.selection import Selection


class Memo:
    """What a site has learnt while running; copies and pickles start anew.

    `fellows`: the layers of its group, in order, itself among them; `settled`: it is not to be grouped any more;
    `plain`: why its last training forward took the plain path, "" where it was fused, None before; `square`: ‖W‖² by
    rows, for one version of one weight; `known`: what it was found to be; `anew`: for these
    adapters it has to be looked at in every call.
    """

    def __init__(self) -> None:
        self.fellows: tuple[nn.Module, ...] = ()
        self.settled = False
        self.plain: str | None = None
        self.known: Known | None = None
        self.anew: Selection | None = None
        self.square: tuple[weakref.ref[Tensor], tuple[int, int, torch.device], Tensor] | None = None

    def __reduce__(self) -> Any:
        return Memo, ()
