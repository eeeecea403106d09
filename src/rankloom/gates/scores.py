"""The linear scores of a router, in float32: softmax((W z + b)/τ) + c."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.core.site import Site
from rankloom.errors import SettingsError
from rankloom.ops.autocast import own_precision

Bias = Literal["none", "inside", "outside"]
"""No bias; b inside the softmax; c added to what the softmax gave."""


class Scores(nn.Module):
    """weight (n, width), bias (n,) if any. Starts: weight ~ N(0, std²), or uniform within 1/√width for std None; bias
    0, or with `start` e_start − 1/n, so that one of the n is taken at first.
    """

    def __init__(
        self,
        site: Site,
        n: int,
        width: int,
        bias: Bias = "none",
        std: float | None = None,
        temperature: float = 1.0,
        start: int | None = None,
    ) -> None:
        super().__init__()
        self.inside, self.std, self.temperature, self.start = bias == "inside", std, temperature, start
        self.weight = nn.Parameter(torch.empty(n, width, dtype=site.dtype, device=site.device))
        self.bias = nn.Parameter(torch.empty(n, dtype=site.dtype, device=site.device)) if bias != "none" else None

    def reset(self) -> None:
        """Fill the parameters."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        if self.std is None:
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
            if self.start is not None:
                with torch.no_grad():
                    self.bias.sub_(1 / self.bias.shape[0])[self.start] += 1

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, probabilities) (…, n) of z (…, width); they differ by the bias outside of the softmax."""
        with own_precision(z):
            bias = None if self.bias is None else self.bias.float()
            scores = F.linear(z.float(), self.weight.float(), bias if self.inside else None)
            found = torch.softmax(scores / self.temperature, dim=-1)
            return (found if bias is None or self.inside else found + bias), found

    def blind(self) -> tuple[Tensor, Tensor] | None:
        """What it gives for any z, where it looks at none: its weight is zero; else None."""
        if self.weight.is_meta or bool(self.weight.any()):
            return None
        found: tuple[Tensor, Tensor] = self(self.weight.new_zeros(self.weight.shape[1]))
        return found


def check_temperature(temperature: float) -> None:
    """Refuse what is not above 0."""
    if not temperature > 0:
        raise SettingsError(f"temperature={temperature}: above 0")
