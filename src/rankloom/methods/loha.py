"""LoHa: the change is the elementwise product of two low-rank matrices, of rank r² at the price of two of rank r.

ΔW = s·(A₁ B₁) ∘ (A₂ B₂), A (out, r), B (r, in), s = lora_alpha/r; B₂ starts at zero. Hyeon-Woo et al., ICLR 2022,
arXiv 2108.06098 (FedPara); Yeh et al., ICLR 2024, arXiv 2309.14859 §4. A convolution may have a core (r, r, k …)
between its factors, which are (r, out) and (r, in) then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.methods.lycoris import LycorisAdapter, kernel_of, spread, through
from rankloom.settings import Probability, Rank


@dataclass(frozen=True)
class LoHa(Method):
    """`r`: of each product; `lora_alpha`: over r it is the scale; `rank_dropout`: part of the rows of ΔW that a
    training step leaves out; `module_dropout`: probability that it leaves out the whole change of a layer;
    `use_effective_conv2d`: convolutions have a core for their kernel.
    """

    r: Rank = 8
    lora_alpha: float = 8.0
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0
    use_effective_conv2d: bool = False

    def build(self, site: Site) -> Adapter:
        """LoHa of one site."""
        site.needs_matrix("loha")
        return LoHaAdapter(site, self)


class LoHaAdapter(LycorisAdapter):
    """`w1_a`, `w2_a` (…, out, r) and `w1_b`, `w2_b` (…, r, in); with cores `t1`, `t2` (r, r, k …) (r, out), (r, in)."""

    roles = dict.fromkeys(("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"), "core")
    peft_names = {name: f"hada_{name}" for name in roles}

    def __init__(self, site: Site, method: LoHa) -> None:
        scaling = method.lora_alpha / method.r
        super().__init__(site, scaling, method.rank_dropout, method.module_dropout, rescale=True)
        kernel, r = kernel_of(site, method.use_effective_conv2d), method.r
        up, down = ((r, site.out), (r, site.weight_shape[1])) if kernel else ((site.out, r), (r, site.in_))
        self.w1_a, self.w1_b, self.w2_a, self.w2_b = (site.empty(*shape) for shape in (up, down, up, down))
        self.t1, self.t2 = (site.empty(r, r, *kernel) if kernel else None for _ in range(2))

    def reset(self, base: Base) -> None:
        with torch.no_grad():
            for tensor in self.parameters(recurse=False):
                spread(tensor, self.lead)
        nn.init.zeros_(self.w2_b)

    def product(self) -> Tensor:
        if self.t1 is None or self.t2 is None:
            return (self.w1_a @ self.w1_b) * (self.w2_a @ self.w2_b)
        return through(self.t1, self.w1_a, self.w1_b) * through(self.t2, self.w2_a, self.w2_b)
