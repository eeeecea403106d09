"""ReLoRA: every few steps the change is folded into the base and starts anew, so that its rank adds up.

W ← W + s·B A, A ~ its start, B = 0, moments of A and B forgotten or pruned; the rate comes up from zero again (jagged
cosine). Lialin et al., ICLR 2024, arXiv 2307.05695 §3. Unlike the released code, A is not zero at first, and folds come
after steps K, 2K, ….
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from rankloom.core.moments import Forget, Part
from rankloom.core.rule import Rule, Run
from rankloom.errors import SettingsError
from rankloom.settings import Count, Steps, Within

Ratio = Annotated[float, Within(0, 1, open_below=True)]
"""Above 0, at most 1."""


@dataclass
class ReLoRA(Rule):
    """`every`: steps between restarts, none after the last step. `reset`: the optimizer's state of what starts anew is
    dropped ("zero"), or the part `prune` of its moments is set to zero, at "random" or the smallest ("magnitude").

    `restart_warmup`: steps in which the rate rises from 0 after a restart, or after each `cycle_length` steps (default:
    `every`). With `min_lr_ratio` the rule's rate is the paper's whole curve, `first_warmup` steps up and a cosine down
    to this part: train with schedule="constant" then. Without it the training's own schedule goes on between the
    warm-ups. `into`: "store" keeps packed weights packed, each fold rounding them anew.
    """

    every: Count = 2000
    reset: Literal["zero", "random", "magnitude"] = "zero"
    prune: Part = 0.999
    restart_warmup: Steps = 50
    cycle_length: Count | None = None
    first_warmup: Steps = 0
    min_lr_ratio: Ratio | None = None
    into: Literal["store", "dense"] = "store"

    def __post_init__(self) -> None:
        if self.min_lr_ratio is None and self.first_warmup:
            raise SettingsError(
                f"ReLoRA(first_warmup={self.first_warmup}) belongs to the curve that min_lr_ratio asks for; without it "
                "the training's own warmup_steps say this"
            )

    @property
    def cycle(self) -> int:
        """Steps from one warm-up of the rate to the next."""
        return self.every if self.cycle_length is None else self.cycle_length

    def start(self, run: Run) -> None:
        """Refuse a base that is split over processes."""
        name = next((n for n, p in run.model.named_parameters() if hasattr(p, "full_tensor")), None)
        if name is not None:
            raise SettingsError(
                f"ReLoRA changes the base, and {name!r} is split over processes: train with sharding='none'"
            )

    def rate(self, run: Run) -> float:
        """The curve at the coming step."""
        if self.min_lr_ratio is None:
            return ramp(run.step, self.cycle, self.restart_warmup)
        return jagged_cosine(
            run.step, run.total_steps, self.cycle, self.restart_warmup, self.first_warmup, self.min_lr_ratio
        )

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Restart the trained adapters when the time has come."""
        done = run.step + 1
        if done % self.every or done >= run.total_steps:
            return
        for name in run.bank.trained:
            run.bank.restart(name, run.optimizer, moments=self._forget(), into=self.into)

    def _forget(self) -> Forget:
        return Forget(self.reset, self.prune)


def ramp(step: int, cycle: int, warmup: int) -> float:
    """t/warmup for t < warmup steps after a restart (every `cycle` steps, not at the first one), else 1."""
    since = step % cycle
    return since / warmup if step >= cycle and since < warmup else 1.0


def jagged_cosine(step: int, total: int, cycle: int, warmup: int, first_warmup: int, floor: float) -> float:
    """The rate's factor at `step`: up to 1 in `first_warmup` steps, then a cosine down to `floor` at `total`; after
    each restart from 0 in `warmup` steps to where the cosine then is.
    """
    if step < first_warmup:
        return step / first_warmup
    up = ramp(step, cycle, warmup)
    at = step if up == 1 else step - step % cycle + warmup
    done = min(max(at - first_warmup, 0) / max(total - first_warmup, 1), 1.0)
    return up * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
