"""Asymmetric LoRA: each factor has its own start and is trained or kept.

ΔW = s·B A; the main setting keeps A at r random orthonormal rows and trains B from zero, at double rank for the same
number of parameters. Zhu et al., ICML 2024, arXiv 2402.16842 §4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.errors import SettingsError
from rankloom.methods.lora import LoRA, LoRAAdapter
from rankloom.methods.residual import ResidualAdapter
from rankloom.ops.linalg import orthonormal_rows
from rankloom.settings import Probability, Rank

Start = Literal["rand", "svd", "svd_last", "he", "zero"]


@dataclass(frozen=True)
class AsymmetricLoRA(Method):
    """Starts of A and B: `rand` orthonormal, `svd`/`svd_last` first/last singular vectors of W, `he` uniform, `zero`;
    `update_A`, `update_B`: trained or kept. What could never train (both kept, or a zero factor kept) is refused.
    """

    r: Rank = 16
    lora_alpha: float = 32.0
    lora_dropout: Probability = 0.0
    init_A: Start = "rand"
    init_B: Start = "zero"
    update_A: bool = False
    update_B: bool = True

    def __post_init__(self) -> None:
        if not (self.update_A or self.update_B):
            raise SettingsError("update_A=False and update_B=False: nothing is trained")
        if "zero" == self.init_A == self.init_B:
            raise SettingsError("init_A='zero' and init_B='zero': neither factor ever has a gradient")
        if (self.init_A == "zero" and not self.update_A) or (self.init_B == "zero" and not self.update_B):
            raise SettingsError("a factor that starts at zero and is not updated keeps the other one without gradient")

    def build(self, site: Site) -> Adapter:
        """The factor pair of one site."""
        site.needs_matrix("asymmetric_lora")
        adapter = AsymmetricLoRAAdapter(site, LoRA(self.r, self.lora_alpha, self.lora_dropout), self)
        return adapter if "zero" in (self.init_A, self.init_B) else ResidualAdapter(site, adapter)


class AsymmetricLoRAAdapter(LoRAAdapter):
    """A LoRA pair with its own starts."""

    def __init__(self, site: Site, lora: LoRA, method: AsymmetricLoRA) -> None:
        super().__init__(site, lora)
        self.starts = (method.init_A, method.init_B)
        self.A.requires_grad_(method.update_A)
        self.B.requires_grad_(method.update_B)

    def reset(self, base: Base) -> None:
        with torch.no_grad():
            self.A.copy_(_rows(self.starts[0], self.A, base.matrix(), fan_in=self.A.shape[-1]))
            self.B.copy_(_rows(self.starts[1], self.B.mT, base.matrix().mT, fan_in=self.B.shape[-1]).mT)


def _rows(start: str, like: Tensor, matrix: Tensor, fan_in: int) -> Tensor:
    """r rows for a factor of shape (…, r, n); `matrix` (…, m, n) gives the singular vectors."""
    r = like.shape[-2]
    if start == "zero":
        return torch.zeros_like(like)
    if start == "rand":
        return orthonormal_rows(like.shape, like.dtype, like.device)
    if start == "he":
        return nn.init.uniform_(torch.empty_like(like), -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
    vh: Tensor = torch.linalg.svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False)[2]
    if r > vh.shape[-2]:
        raise SettingsError(f"r={r}: W has only {vh.shape[-2]} singular vectors")
    return vh[..., :r, :] if start == "svd" else vh[..., -r:, :]
