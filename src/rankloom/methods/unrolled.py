"""Unrolled LoRA: the other low-rank family of a convolution.

ΔW = s·reshape(B A, (out, in/groups, k, k)) with A (r·k, in·k), B (out/groups·k, r·k) for a 2-d k × k kernel. LoRA's
reference code (arXiv 2106.09685) adapts convolutions this way; PEFT and `LoRA` here use A as a k × k kernel instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.errors import TargetError
from rankloom.methods.lora import scale_of
from rankloom.settings import Rank
from rankloom.starts.plain import fill


@dataclass(frozen=True)
class UnrolledLoRA(Method):
    """`r`, `lora_alpha` as in LoRA, for `nn.Conv2d` with square kernels."""

    r: Rank = 8
    lora_alpha: float = 8.0

    def build(self, site: Site) -> Adapter:
        """The unrolled pair of one convolution."""
        if site.kind.name != "conv2d" or len(site.weight_shape) != 4 or site.weight_shape[2] != site.weight_shape[3]:
            raise TargetError(
                f"unrolled_lora: site {site.name!r} is {site.kind.name} of shape {site.weight_shape}; "
                "it needs a Conv2d with a square kernel"
            )
        return UnrolledLoRAAdapter(site, self)


class UnrolledLoRAAdapter(Adapter):
    """A (r·k, in·k), B (out/groups·k, r·k); `in` counts all groups."""

    roles = {"A": "in", "B": "out"}

    def __init__(self, site: Site, method: UnrolledLoRA) -> None:
        super().__init__(site.name)
        out, in_, k, _ = site.weight_shape
        self.scaling = scale_of(method.lora_alpha, method.r, "standard")
        make = partial(torch.empty, dtype=site.dtype, device=site.device)
        self.A = nn.Parameter(make(method.r * k, in_ * site.groups * k))
        self.B = nn.Parameter(make(out // site.groups * k, method.r * k))

    def reset(self, base: Base) -> None:
        fill("kaiming", self, base)

    def delta(self, base: Base) -> Tensor:
        return (self.scaling * (self.B @ self.A)).reshape(base.kind.shape(base.layer))
