"""MoV: (IA)³ vectors as experts, merged softly for every token and then applied once.

z' = z ∘ Σ_i g_i v_i, v (n, channels) starting at ones, g = softmax(R z) of the very activation z that is scaled: a
layer's output (keys, values), or the input of the second linear layer of an MLP. Zadouri et al., ICLR 2024,
arXiv 2309.05444; released code. There a top-k of g without renormalising shrinks z at the start; here the change is
z ∘ Σ_i g_i (v_i − 1), which is the same for weights that sum to 1 and none at the start for all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.gate import Gate
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.core.targets import matches
from rankloom.errors import SettingsError, TargetError
from rankloom.gates.linear import Linear
from rankloom.gates.topk import TopK


@dataclass(frozen=True)
class MoV(Method):
    """`n` vectors a site, weighed by `gate`, which is given the activation.

    `inputs`: name suffixes of layers whose input is scaled; of all others it is the output. `head_dim`: each head of an
    output is routed by itself, all by one router (None: the activation as a whole).
    """

    examples: ClassVar = {"gate": (Linear(temperature=5.0), TopK(1)), "head_dim": (6, 4)}
    n: int = 10
    gate: Gate = field(default_factory=lambda: Linear(std=0.02))
    inputs: tuple[str, ...] = ("down_proj", "fc2", "wo", "fc_out", "dense_4h_to_h")
    head_dim: int | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise SettingsError(f"n={self.n}: at least one vector")

    def build(self, site: Site) -> Adapter:
        """The vectors and the router of one linear layer."""
        site.needs_linear("mov", "it weighs the tokens of linear layers")
        if self.gate.source != "layer":
            raise SettingsError(f"gate={self.gate}: mov routes by the activation that it scales, so by a layer's gate")
        scales_input = matches(self.inputs, site.name)
        width = site.in_ if scales_input else site.out
        if self.head_dim is not None and not scales_input:
            if width % self.head_dim:
                raise TargetError(f"mov: {site.name!r} has {width} rows, not a multiple of head_dim={self.head_dim}")
            width = self.head_dim
        return MoVAdapter(site, self, width, scales_input)


class MoVAdapter(Adapter):
    """`vectors` (n, channels); `gate`: router over what is scaled, (…, channels) or (…, heads, head_dim)."""

    roles = {"vectors": "scale", "gate": "router"}

    def __init__(self, site: Site, method: MoV, width: int, scales_input: bool) -> None:
        super().__init__(site.name)
        self.width, self.scales_input = width, scales_input
        channels = site.in_ if scales_input else site.out
        self.vectors = nn.Parameter(torch.empty(method.n, channels, dtype=site.dtype, device=site.device))
        self.gate = method.gate.build(site.part(site.name, (site.out, width)), method.n)

    def extra_repr(self) -> str:
        return f"n={self.vectors.shape[0]}, scales the {'input' if self.scales_input else 'output'}"

    def reset(self, base: Base) -> None:
        nn.init.ones_(self.vectors)
        self.gate.reset()

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        z = x.to(y.dtype) if self.scales_input else y
        moved = z * self._amount(z, base).to(y.dtype)
        return base.apply(moved, base.matrix().to(y.dtype)) if self.scales_input else moved

    def delta(self, base: Base) -> Tensor:
        amount, matrix = self._amount(None, base), base.matrix()
        return matrix * (amount if self.scales_input else amount[:, None]).to(matrix.dtype)

    def delta_bias(self, base: Base) -> Tensor | None:
        bias = base.bias()
        return None if bias is None or self.scales_input else self._amount(None, base).to(bias.dtype) * bias

    def _amount(self, z: Tensor | None, base: Base) -> Tensor:
        """Σ_i g_i (v_i − 1), (…, channels) for the activation z; (channels,) for none."""
        vectors = (self.vectors - 1).reshape(self.vectors.shape[0], -1, self.width)
        apart = None if z is None else z.reshape(*z.shape[:-1], -1, self.width)
        weights = self.gate(apart, base).to(vectors.dtype)
        if weights.ndim == 1:
            weights = weights.expand(vectors.shape[1], -1)
        amount: Tensor = torch.einsum("...hn,nhd->...hd", weights, vectors)
        return amount.flatten(-2)
