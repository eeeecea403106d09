"""A rule: what a system does to training beyond gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    import torch

    from rankloom.core.bank import Bank


class Run(Protocol):
    """What a rule may see of a training, whoever drives it (our loop, or a Trainer through the callback)."""

    model: nn.Module

    @property
    def bank(self) -> Bank:
        """The model's bank; raises `StateError` for a model without adapters."""
        ...

    optimizer: torch.optim.Optimizer
    step: int
    """Optimizer steps done so far: 0 in the first step."""
    total_steps: int


class Rule:
    """One training idea. Hooks run in the fixed order of a step:

    groups → start → [ before_step → forward → loss → backward → after_backward → clip → optimizer step → after_step
    → zero_grad ]* → finish. `start` makes all memory afresh; `state`/`restore` carry it through a checkpoint.
    A rule finds parameters by role, never by name.
    """

    def groups(self, run: Run, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Split or change the optimizer's parameter groups."""
        return groups

    def start(self, run: Run) -> None:
        """Make the memory; the optimizer exists."""

    def before_step(self, run: Run) -> None:
        """Before the first forward of a step: sample ranks, masks."""

    def loss(self, run: Run, loss: Tensor) -> Tensor:
        """The loss with this rule's penalties added."""
        return loss

    def after_backward(self, run: Run) -> None:
        """Gradients are complete and not yet clipped; weights are those of the forward."""

    def after_step(self, run: Run) -> None:
        """Weights are stepped, gradients still there: prox, masks, folds, restarts."""

    def finish(self, run: Run) -> None:
        """After the last step."""

    def state(self) -> dict[str, Any]:
        """Memory as tensors and JSON values, for the checkpoint."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave; called after `start`."""
