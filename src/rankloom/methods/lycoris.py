"""What LoHa and LoKr share: a change with a dense matrix, of which training drops rows, or all of it."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.site import Site


class LycorisAdapter(Adapter):
    """ΔW = `scaling` · `product()`; in training a part `rank_dropout` of its rows is 0, and with probability
    `module_dropout` all of it. `rescale`: the rows that are left count more, so that the mean stays.
    """

    def __init__(self, site: Site, scaling: float, rank_dropout: float, module_dropout: float, rescale: bool) -> None:
        super().__init__(site.name)
        self.scaling, self.lead = scaling, len(site.shape) - 2
        self.rank_dropout, self.module_dropout, self.rescale = rank_dropout, module_dropout, rescale

    @abstractmethod
    def product(self) -> Tensor:
        """The matrix (…, out, in) before it is scaled."""

    def delta(self, base: Base) -> Tensor:
        return self.scaling * self.product()

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        change = self._thinned(self.delta(base)) if self.training else self.delta(base)
        return base.apply(x, change.to(y.dtype))

    def _thinned(self, change: Tensor) -> Tensor:
        if self.rank_dropout:
            kept = (torch.rand(change.shape[-2], device=change.device) > self.rank_dropout).to(change.dtype)
            if self.rescale:
                kept = kept / kept.mean().clamp_min(1 / len(kept))
            change = change * kept[:, None]
        if self.module_dropout:
            change = change * (torch.rand(1, device=change.device) > self.module_dropout)
        return change


def spread(tensor: Tensor, lead: int) -> None:
    """U(−1/√n, 1/√n), n numbers in a row after `lead` leading dims: how a linear layer's weight starts."""
    bound = 1 / math.sqrt(math.prod(tensor.shape[lead + 1 :]))
    nn.init.uniform_(tensor, -bound, bound)


def kernel_of(site: Site, effective: bool) -> tuple[int, ...]:
    """The kernel of a convolution that is to have a core of its own; empty for all other sites and 1 × 1 kernels."""
    kernel = site.weight_shape[2:] if site.kind.name in ("conv1d", "conv2d") and effective else ()
    return () if math.prod(kernel) == 1 else (*kernel, *(1,) * (2 - len(kernel)))


def through(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(out, in · k …): a core (r, r, k …) between `up` (r, out) and `down` (r, in)."""
    return torch.einsum("ijkl,ip,jq->pqkl", core, up, down).flatten(1)
