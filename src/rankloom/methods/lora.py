"""LoRA: the change of a matrix is a product of two thin ones.

ΔW = s·B A with A (r, in), B (out, r), s = lora_alpha/r or lora_alpha/√r; y = W x + b + s·B A dropout(x).
Hu et al., ICLR 2022, arXiv 2106.09685 §4; rsLoRA's scale: Kalajdzievski 2023, arXiv 2312.03732.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.core.thin import Thin
from rankloom.errors import SettingsError, TargetError
from rankloom.methods.residual import ResidualAdapter
from rankloom.settings import Probability, Rank
from rankloom.starts.plain import NONZERO, check_start, fill


@dataclass(frozen=True)
class LoRA(Method):
    """`r`: the rank; `lora_alpha`: over r or √r it is the scale; `scaling`: over r ("standard") or √r ("rslora");
    `lora_dropout`: on the input of the change; `init_lora_weights`: the start of both factors; `lora_bias`: a bias
    after B; `frozen`: the factor that is kept as it starts.
    """

    r: Rank = 8
    lora_alpha: float = 8.0
    lora_dropout: Probability = 0.0
    init_lora_weights: str = "kaiming"
    scaling: Literal["standard", "rslora"] = "standard"
    frozen: Literal["none", "A", "B"] = "none"
    lora_bias: bool = False

    examples: ClassVar = {"init_lora_weights": ("gaussian", "orthogonal")}

    def __post_init__(self) -> None:
        check_start(self.init_lora_weights)
        if self.frozen == "B" and self.init_lora_weights not in NONZERO:
            raise SettingsError(
                f"frozen='B' with init_lora_weights={self.init_lora_weights!r}: B stays 0 and nothing can train; "
                "use asymmetric_lora(update_A=True, update_B=False)"
            )

    def build(self, site: Site) -> Adapter:
        """LoRA of one site."""
        site.needs_matrix("lora")
        if self.lora_bias and site.kind.name == "embedding":
            raise TargetError(f"lora: site {site.name!r} is an embedding and has no bias: leave lora_bias out for it")
        adapter = LoRAAdapter(site, self)
        return ResidualAdapter(site, adapter) if self.init_lora_weights in NONZERO else adapter


class LoRAAdapter(Adapter):
    """A (…, r, in), B (…, out, r), optional bias (out,)."""

    roles = {"A": "in", "B": "out", "bias": "out"}
    peft_names = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias"}

    def __init__(self, site: Site, method: LoRA) -> None:
        super().__init__(site.name)
        self.start = method.init_lora_weights
        self.scaling = scale_of(method.lora_alpha, method.r, method.scaling)
        self.dropout = method.lora_dropout
        self.A = site.empty(method.r, site.in_, trainable=method.frozen != "A")
        self.B = site.empty(site.out, method.r, trainable=method.frozen != "B")
        self.bias = site.empty(site.out) if method.lora_bias and not site.bare else None

    def extra_repr(self) -> str:
        return f"r={self.A.shape[-2]}, scaling={self.scaling:g}"

    def reset(self, base: Base) -> None:
        fill(self.start, self, base)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def thin(self, base: Base, x: Any) -> Thin:
        bias = None if self.bias is None else self.scaling * self.bias
        return Thin(self.A, self.B, self.scaling, bias=bias, dropout=self.dropout if self.training else 0.0)


def scale_of(alpha: float, r: int, scaling: str) -> float:
    """lora_alpha/r, or lora_alpha/√r for "rslora"."""
    return alpha / (math.sqrt(r) if scaling == "rslora" else r)
