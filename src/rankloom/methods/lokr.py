"""LoKr: the change is a Kronecker product of two small matrices, each whole or of low rank.

ΔW = s·W₁ ⊗ W₂, W₁ (l, m), W₂ (k, n · kernel), l·k = out, m·n = in, s = lora_alpha/r; W₁ starts at zero. Yeh et al.,
ICLR 2024, arXiv 2309.14859 §4. A factor whose longer side is at most 2r is whole, else A B of rank r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.methods.lycoris import LycorisAdapter, kernel_of, spread, through
from rankloom.settings import Probability, Rank, Where


@dataclass(frozen=True)
class LoKr(Method):
    """`r`: of a factor that is not whole; `lora_alpha`: over r it is the scale; `decompose_factor`: size of W₁, at most
    (-1: near the root of the layer's); `decompose_both`: W₁ may be of low rank too; `init_weights`: "lycoris" has W₂
    start at zero in the place of W₁; `rank_dropout`: part of the rows of ΔW that a training step leaves out,
    `rank_dropout_scale`: the others count more for it; `module_dropout`: probability that it leaves out the whole
    change of a layer; `use_effective_conv2d`: convolutions have a core for their kernel.
    """

    r: Rank = 8
    lora_alpha: float = 8.0
    decompose_factor: Annotated[int, Where("{} from 1 on, or -1", lambda n: n == -1 or n > 0)] = -1
    decompose_both: bool = False
    init_weights: Literal["default", "lycoris"] = "default"
    rank_dropout: Probability = 0.0
    rank_dropout_scale: bool = False
    module_dropout: Probability = 0.0
    use_effective_conv2d: bool = False

    examples: ClassVar = {"decompose_factor": (2, 1)}

    def build(self, site: Site) -> Adapter:
        """LoKr of one site."""
        site.needs_matrix("lokr")
        return LoKrAdapter(site, self)


class LoKrAdapter(LycorisAdapter):
    """`w1` (…, l, m) or `w1_a` (…, l, r), `w1_b` (…, r, m); `w2` (…, k, n, kernel) or `w2_a` (…, k, r), `w2_b` (…, r,
    n·kernel), or with a core `t2` (r, r, kernel): `w2_a` (r, k), `w2_b` (r, n).
    """

    roles = dict.fromkeys(("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"), "core")
    peft_names = {name: f"lokr_{name}" for name in roles}

    def __init__(self, site: Site, method: LoKr) -> None:
        scaling = method.lora_alpha / method.r
        super().__init__(site, scaling, method.rank_dropout, method.module_dropout, method.rank_dropout_scale)
        convolves = site.kind.name.startswith("conv") and not site.kind.linear
        kernel = site.weight_shape[2:] if convolves else ()
        size, r = math.prod(kernel), method.r
        (l, k), (m, n) = (factors(d, method.decompose_factor) for d in (site.out, site.in_ // size))
        core = kernel_of(site, method.use_effective_conv2d)
        for name in self.roles:
            self.register_parameter(name, None)
        if method.decompose_both and 2 * r < max(l, m):
            self.w1_a, self.w1_b = site.empty(l, r), site.empty(r, m)
        else:
            self.w1 = site.empty(l, m)
        if 2 * r >= max(k, n):
            self.w2 = site.empty(k, n, *kernel)
        elif core:
            self.w2_a, self.w2_b, self.t2 = site.empty(r, k), site.empty(r, n), site.empty(r, r, *core)
        else:
            self.w2_a, self.w2_b = site.empty(k, r), site.empty(r, n * size)
        self.start = ("w2", "w2_b") if method.init_weights == "lycoris" else ("w1", "w1_a")

    def reset(self, base: Base) -> None:
        with torch.no_grad():
            for name, tensor in self.named_parameters(recurse=False):
                nn.init.zeros_(tensor) if name in self.start else spread(tensor, self.lead)

    def product(self) -> Tensor:
        w1 = self.w1 if self.w1 is not None else self.w1_a @ self.w1_b
        w2 = self._second()
        wide = torch.einsum("...lm,...kn->...lkmn", w1, w2)
        return wide.flatten(-2).flatten(-3, -2)

    def _second(self) -> Tensor:
        if self.w2 is not None:
            return self.w2.flatten(self.lead + 1)
        return self.w2_a @ self.w2_b if self.t2 is None else through(self.t2, self.w2_a, self.w2_b)


def factors(size: int, most: int) -> tuple[int, int]:
    """Two factors of `size`: `most` and its partner where it divides, else those nearest to the root within `most`."""
    if most > 0 and size % most == 0:
        return most, size // most
    small = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and (most < 0 or d <= most))
    return small, size // small
