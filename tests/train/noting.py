"""Adapters that say something of each forward pass, and a rule that asks for it: a balance penalty on activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rankloom as rl
from rankloom.core.base import Base
from rankloom.core.rule import Rule
from rankloom.core.site import Site
from rankloom.core.thin import Thin
from rankloom.methods.lora import LoRAAdapter


class NotingAdapter(LoRAAdapter):
    """LoRA that notes the shares of a softmax over its thin activations, as a router would, and the context."""

    def thin(self, base: Base, x: Any) -> Thin:
        if x is not None:
            base.note("router", (x @ self.A.mT).softmax(-1))
            for name, value in base.context.items():
                base.note(f"context/{name}", value)
        return super().thin(base, x)


@dataclass(frozen=True)
class Noting(rl.LoRA):
    """LoRA whose adapters note."""

    def build(self, site: Site) -> NotingAdapter:
        return NotingAdapter(site, self)


@dataclass
class Balance(Rule):
    """loss + weight · Σ over sites of r·Σ_k (mean share of k)²: the load balance of a mixture's router."""

    weight: float = 1.0
    reads = ("router",)

    def loss(self, run: Any, loss: Tensor) -> Tensor:
        found = run.notes["router"]
        assert found, "nothing was noted"
        each = [p.shape[-1] * p.flatten(0, -2).mean(0).square().sum() for p in found.values()]
        return loss + self.weight * torch.stack(each).sum().to(loss)
