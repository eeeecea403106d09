"""The rank budget of AdaLoRA: triplets compete across layers, and the number that may live falls by a cubic.

Importance of an element: I = |p·g| smoothed (β₁), its deviation smoothed (β₂), score = I·U; of a triplet k:
s(E_k) + mean_j s(A_kj) + mean_j s(B_jk). Zhang et al., ICLR 2023, arXiv 2303.10512 eq. 7–12, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.rule import Rule, Run
from rankloom.errors import SettingsError
from rankloom.rules.triplets import by_owner

Triplet = dict[str, nn.Parameter]


@dataclass
class Budget(Rule):
    """Ends with `target_r` triplets a site on average. Needs the total number of steps, and tinit + tfinal below it."""

    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    _mean: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _spread: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _mask: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def start(self, run: Run) -> None:
        """Check the schedule and forget everything."""
        if self.tinit + self.tfinal >= run.total_steps:
            raise SettingsError(
                f"AdaLoRA: tinit={self.tinit} + tfinal={self.tfinal} must be below the {run.total_steps} steps of the run"
            )
        self._mean, self._spread, self._mask = {}, {}, {}

    @torch.no_grad()
    def after_backward(self, run: Run) -> None:
        """Update the importance from gradients and the weights that made them."""
        for owner, triplet in triplets(run):
            for role, parameter in triplet.items():
                if parameter.grad is None:
                    continue
                key = f"{owner}|{role}"
                now = (parameter * parameter.grad).abs()
                mean = self._mean.get(key, torch.zeros_like(now))
                mean = self.beta1 * mean + (1 - self.beta1) * now
                spread = self._spread.get(key, torch.zeros_like(now))
                self._spread[key] = self.beta2 * spread + (1 - self.beta2) * (now - mean).abs()
                self._mean[key] = mean

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Zero the E of the least important triplets; in the final phase the last mask is kept at every step."""
        step, total = run.step + 1, run.total_steps
        living = list(triplets(run))
        if step <= self.tinit:
            return
        final = step > total - self.tfinal
        if (not final and step % self.deltaT == 0) or not self._mask:
            ranks = sum(t["singular"].numel() for _, t in living)
            self._mask = self.choose(
                living, budget_at(step, ranks, self.target_r * len(living), self.tinit, self.tfinal, total)
            )
            self._apply(living)
        elif final:
            self._apply(living)

    def choose(self, living: list[tuple[str, Triplet]], budget: int) -> dict[str, Tensor]:
        """Masks that keep exactly `budget` triplets: the highest scores over all sites (the earlier one at a tie)."""
        scores = {owner: self.score(owner) for owner, _ in living}
        flat = torch.cat([s.flatten() for s in scores.values()])
        keep = torch.zeros_like(flat, dtype=torch.bool)
        keep[flat.argsort(descending=True, stable=True)[: max(budget, 0)]] = True
        parts = keep.split([s.numel() for s in scores.values()])
        return {owner: part.reshape(s.shape) for (owner, s), part in zip(scores.items(), parts)}

    def score(self, owner: str) -> Tensor:
        """Scores (…, r) of the triplets of one owner."""
        e, a, b = (
            self._mean[f"{owner}|{role}"] * self._spread[f"{owner}|{role}"] for role in ("singular", "in", "out")
        )
        return e.squeeze(-1) + a.mean(-1) + b.mean(-2)

    def _apply(self, living: list[tuple[str, Triplet]]) -> None:
        for owner, triplet in living:
            triplet["singular"].mul_(self._mask[owner][..., None].to(triplet["singular"]))

    def state(self) -> dict[str, Any]:
        """Importances, deviations and the last masks."""
        return {"mean": dict(self._mean), "spread": dict(self._spread), "mask": dict(self._mask)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._mean, self._spread, self._mask = dict(state["mean"]), dict(state["spread"]), dict(state["mask"])


def triplets(run: Run) -> list[tuple[str, Triplet]]:
    """Owners of a factor triplet in the active adapters, found by role, in a fixed order."""
    return [(o, t) for o, t in by_owner(run.bank.trainable()) if {"in", "out", "singular"} <= t.keys()]


def budget_at(step: int, initial: int, target: int, tinit: int, tfinal: int, total: int) -> int:
    """Triplets that may live at `step`: `initial` up to tinit, then a cubic down to `target` at total − tfinal."""
    if step <= tinit:
        return initial
    if step > total - tfinal:
        return target
    left = 1 - (step - tinit) / (total - tfinal - tinit)
    return int(target + (initial - target) * left**3)
