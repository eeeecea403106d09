"""The rank budget of AdaLoRA: triplets compete across layers, and the number that may live falls by a cubic.

Importance of an element: I = |p·g| smoothed (β₁), its deviation U smoothed (β₂), score s = I·U; of a triplet k:
s(E_k) + mean_j s(A_kj) + mean_j s(B_jk). Zhang et al., ICLR 2023, arXiv 2303.10512 eq. 7–12, algorithm 1.
The variant `metric="mag"` takes s = |p| instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankloom.core.rule import Rule, Run
from rankloom.errors import SettingsError
from rankloom.rules.triplets import by_owner
from rankloom.settings import Count, Probability, Rank, Steps

Triplet = dict[str, nn.Parameter]


@dataclass
class Budget(Rule):
    """Ends with `target_r` triplets a matrix on average. Needs the total number of steps, and tinit + tfinal below it.

    Masks are chosen at every `deltaT`-th step after `tinit` and once more when `tfinal` steps are left; that last one
    is kept. Between two choices a masked triplet goes on learning and may come back.
    """

    target_r: Rank = 8
    tinit: Steps = 0
    tfinal: Steps = 0
    deltaT: Count = 1
    beta1: Probability = 0.85
    beta2: Probability = 0.85
    metric: Literal["ipt", "mag"] = "ipt"
    _mean: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _spread: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _mask: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def start(self, run: Run) -> None:
        """Check the schedule and forget everything."""
        if self.tinit + self.tfinal >= run.total_steps:
            raise SettingsError(
                f"AdaLoRA: tinit={self.tinit} + tfinal={self.tfinal} must be below the run's {run.total_steps} steps"
            )
        if not triplets(run):
            raise SettingsError("a rank budget needs adapters in SVD form, such as AdaLoRA(init_r=…); no active one is")
        self._mean, self._spread, self._mask = {}, {}, {}

    @torch.no_grad()
    def after_backward(self, run: Run) -> None:
        """Update the importance from gradients and the weights that made them, as long as a choice is to come."""
        if run.step + 1 > run.total_steps - self.tfinal:
            return
        for owner, triplet in triplets(run):
            for role, parameter in triplet.items():
                key = f"{owner}|{role}"
                gradient = parameter.grad
                now = torch.zeros_like(parameter) if gradient is None else (parameter * gradient).abs()
                mean = self._mean.get(key, torch.zeros_like(now))
                mean = self.beta1 * mean + (1 - self.beta1) * now
                spread = self._spread.get(key, torch.zeros_like(now))
                self._spread[key] = self.beta2 * spread + (1 - self.beta2) * (now - mean).abs()
                self._mean[key] = mean

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Zero the E of the least important triplets; in the final phase the last mask is kept at every step."""
        step, last = run.step + 1, run.total_steps - self.tfinal
        if step <= self.tinit or (step < last and step % self.deltaT):
            return
        living = triplets(run)
        if step <= last:
            ranks = sum(t["singular"].numel() for _, t in living)
            matrices = sum(t["singular"].numel() // t["singular"].shape[-2] for _, t in living)
            target = self.target_r * matrices
            self._mask = self.choose(living, budget_at(step, ranks, target, self.tinit, self.tfinal, run.total_steps))
        for owner, triplet in living:
            triplet["singular"].mul_(self._mask[owner][..., None].to(triplet["singular"]))

    def choose(self, living: list[tuple[str, Triplet]], budget: int) -> dict[str, Tensor]:
        """Masks that keep exactly `budget` triplets: the highest scores over all sites (the earlier one at a tie)."""
        scores = {owner: self.score(owner, triplet) for owner, triplet in living}
        flat = torch.cat([s.flatten() for s in scores.values()])
        keep = torch.zeros_like(flat, dtype=torch.bool)
        keep[flat.argsort(descending=True, stable=True)[: max(budget, 0)]] = True
        parts = torch.split(keep, [s.numel() for s in scores.values()])
        return {owner: part.reshape(s.shape) for (owner, s), part in zip(scores.items(), parts)}

    def score(self, owner: str, triplet: Triplet) -> Tensor:
        """Scores (…, r) of the triplets of one owner."""
        e, a, b = (self._elements(f"{owner}|{role}", triplet[role]) for role in ("singular", "in", "out"))
        return e.squeeze(-1) + a.mean(-1) + b.mean(-2)

    def _elements(self, key: str, parameter: Tensor) -> Tensor:
        return parameter.abs() if self.metric == "mag" else self._mean[key] * self._spread[key]

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
