"""A penalty that keeps factors orthonormal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankloom.core.rule import Rule, Run
from rankloom.settings import NotNegative


@dataclass
class Orthogonal(Rule):
    """loss + weight · mean over all factors of ‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F (AdaLoRA, arXiv 2303.10512 eq. 4)."""

    weight: NotNegative = 0.5

    def loss(self, run: Run, loss: Tensor) -> Tensor:
        """Add the penalty over every trainable factor with role in or out."""
        grams = [
            p @ p.mT if role == "in" else p.mT @ p
            for _, p, role in run.bank.trainable()
            if role in ("in", "out") and p.ndim > 1
        ]
        if not grams or not self.weight:
            return loss
        norms = [
            torch.linalg.matrix_norm(g - torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)).mean() for g in grams
        ]
        return loss + self.weight * torch.stack(norms).mean().to(loss)
