"""LoRA-FA's projected gradient: the step of B that comes nearest to the full gradient step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankloom.core.adapter import Adapter
from rankloom.core.rule import Rule, Run
from rankloom.errors import SettingsError
from rankloom.settings import NotNegative


@dataclass
class ProjectedGradient(Rule):
    """ĝ_B = g_B (A Aᵀ + damping·I)⁻¹ / s² for every pair whose A is frozen: minimises ‖s ĝ_B A − g_W‖_F
    (LoRA-FA, arXiv 2308.03303, revised version). Always in float32 at least.
    """

    damping: NotNegative = 1e-8

    def start(self, run: Run) -> None:
        """Refuse a run without a frozen A."""
        if not self._pairs(run):
            raise SettingsError("the LoRA-FA projection needs adapters with a frozen A: LoRA(frozen='A')")

    @torch.no_grad()
    def after_backward(self, run: Run) -> None:
        """Replace the gradient of each B."""
        for adapter in self._pairs(run):
            if adapter.B.grad is not None:
                with torch.autocast(adapter.A.device.type, enabled=False):
                    adapter.B.grad.copy_(projected(adapter.B.grad, adapter.A, adapter.scaling, self.damping))

    def _pairs(self, run: Run) -> list[Adapter]:
        found = []
        for name in run.bank.trained:
            for _, adapter in run.bank.adapters(name, of=Adapter):
                roles = type(adapter).roles
                is_pair = roles.get("A") == "in" and roles.get("B") == "out" and "E" not in roles
                if is_pair and adapter.B.requires_grad and not adapter.A.requires_grad:
                    found.append(adapter)
        return found


def projected(gradient: Tensor, a: Tensor, scaling: float, damping: float) -> Tensor:
    """ĝ_B (…, out, r) for the gradient of B and A (…, r, in), in float32 at least."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    a = a.to(dtype)
    gram = a @ a.mT + damping * torch.eye(a.shape[-2], dtype=dtype, device=a.device)
    solved: Tensor = torch.linalg.solve(gram, gradient.to(dtype).mT)
    return solved.mT / scaling**2
