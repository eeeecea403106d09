"""A rule: what a system does to training beyond gradient descent."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from rankloom.core.notes import Notes
from rankloom.core.view import BankView
from rankloom.settings import Settings


class Run(Protocol):
    """What a rule may see of a training, whoever drives it (our loop, or a Trainer through the callback).

    `step`: optimizer steps done so far, 0 in the first step; `parameters`: the tensors that train, by key; `batch`,
    `output`: of the forward pass that `Rule.loss` is called for, None outside of it; `notes`: what adapters said in
    it, of the kinds that the rules read.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int
    total_steps: int
    parameters: dict[str, nn.Parameter]
    device: torch.device
    batch: Any
    output: Any
    notes: Notes

    @property
    def bank(self) -> BankView:
        """The model's bank; raises `StateError` for a model without adapters."""
        ...

    def forward(self, batch: Any, *names: str) -> Any:
        """The model's output for `batch` with these adapters active, the base alone without any; with gradients as
        they are enabled here. It disturbs neither notes nor hooks of the running step.

        A mapping goes in as keywords, of a tuple all but its last (the target), anything else alone.
        """
        ...

    def replace(self, parameter: nn.Parameter, new: Tensor, kept: tuple[int, Tensor] | None = None) -> nn.Parameter:
        """Put a tensor of another shape in the place of a trained parameter, wherever it is registered, in the
        optimizer and in `parameters`. Returns the new parameter.

        Its optimizer state starts anew, except that with `kept`, (dim, indices) of the old one that `new` consists of,
        the state of these is kept.
        """
        ...


class Rule(Settings):
    """One training idea. Hooks run in the fixed order of a step:

    groups → start → [ before_step → rate → forward → loss → backward → after_backward → clip → optimizer step →
    after_step → zero_grad ]* → finish. `start` makes all memory afresh; `state`/`restore` carry it through a
    checkpoint. A rule finds parameters by role, never by name. `reads`: kinds of notes that it looks at in `loss`.
    """

    reads: ClassVar[tuple[str, ...]] = ()

    def groups(self, run: Run, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Split or change the optimizer's parameter groups."""
        return groups

    def start(self, run: Run) -> None:
        """Make the memory; the optimizer exists."""

    def before_step(self, run: Run) -> None:
        """Before the first forward of a step: sample ranks, masks."""

    def rate(self, run: Run) -> float:
        """Factor on the learning rate of every group in the coming step, beside the schedule's. The rates that stand in
        the groups are set anew for each step: change them here.
        """
        return 1.0

    def loss(self, run: Run, loss: Tensor) -> Tensor:
        """The loss of one forward pass with this rule's penalties; the graph is alive, `run.batch` and `run.output`
        are those of this pass.
        """
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
