"""What stops a run: tensors without gradients, and numbers that are none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankloom.errors import RankloomError, UnreachedError

SHOWN = 5
PATIENCE = 20
"""Steps in which a tensor must have had a gradient once."""


class DivergedError(RankloomError, ArithmeticError):
    """A loss, gradient or weight is not a finite number."""


REMEDY = (
    "Usual reasons: (1) the layer is not called: attach(..., probe=batch) names such sites; leave them out by "
    "exclude_modules; (2) gradient "
    "checkpointing with use_reentrant=True on frozen inputs: use TrainSettings(gradient_checkpointing=True) or "
    "model.enable_input_require_grads(); (3) a branch or expert that this batch does not use: exclude it, or "
    "TrainSettings(dead_gradients='warn'); (4) torch.no_grad() or detach() around the model"
)


@dataclass
class Reached:
    """Watches that every trainable tensor gets a gradient, be it zero, in one of the first steps: a layer may be
    dropped at random (LayerDrop, stochastic depth), an expert not be chosen. `settled`: nothing is left to watch.
    """

    action: Literal["error", "warn"]
    steps: int = 0
    waiting: set[str] | None = None
    settled: bool = False

    def look(self, parameters: Mapping[str, nn.Parameter], last: bool) -> None:
        """After a backward pass; `last`: no other follows. Raises `UnreachedError`, or warns."""
        dead = [
            key for key, p in parameters.items() if p.grad is None and (self.waiting is None or key in self.waiting)
        ]
        self.steps, self.waiting = self.steps + 1, set(dead)
        patient = len(dead) < len(parameters) and self.steps < PATIENCE and not last
        self.settled = not dead or not patient
        if not dead or patient:
            return
        steps = "the first step" if self.steps == 1 else f"{self.steps} steps"
        message = f"no gradient after {steps} in {len(dead)} of {len(parameters)} tensors: {some(dead)}. {REMEDY}"
        if self.action == "error":
            raise UnreachedError(message)
        warnings.warn(message, stacklevel=5)


def check_graph(loss: Tensor, step: int) -> None:
    """A loss that can be trained on: one number, with a graph behind it."""
    if loss.numel() != 1:
        raise RankloomError(f"step {step}: the loss has shape {tuple(loss.shape)}; give one number, such as its mean")
    if not loss.requires_grad:
        raise UnreachedError(f"step {step}: the loss does not depend on any trainable tensor. {REMEDY}")


def total_norm(parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, in float32 at least; 0-d."""
    norms = [
        torch.linalg.vector_norm(p.grad.detach(), dtype=torch.promote_types(p.grad.dtype, torch.float32))
        for p in parameters.values()
        if p.grad is not None
    ]
    if not norms:
        return torch.zeros(())
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, norms[0].dtype) for n in norms]))
    return total


def scale_gradients(parameters: Mapping[str, nn.Parameter], norm: float, largest: float) -> None:
    """Shrink all gradients so that their norm is at most `largest`."""
    if norm > largest:
        grads = [p.grad for p in parameters.values() if p.grad is not None]
        torch._foreach_mul_(grads, largest / norm)


def diverged(step: int, what: str, parameters: Mapping[str, nn.Parameter], loss: float) -> DivergedError:
    """The error for a loss or gradient that is not finite, naming the tensors."""
    weights = [key for key, p in parameters.items() if not bool(torch.isfinite(p.detach()).all())]
    grads = [key for key, p in parameters.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    where = [f"weights not finite: {some(weights)}"] if weights else []
    where += [f"gradients not finite: {some(grads)}"] if grads else []
    return DivergedError(
        f"step {step}: the {what} is not finite (loss {loss}); {'; '.join(where) or 'all tensors are finite'}. "
        "Lower lr, use a warm-up, look at the batch of this step, or use precision='bf16' instead of 'fp16'"
    )


def optimizer_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The tensors of an optimizer's memory, by the parameter's name and their own."""
    return {
        f"{key}, {kind} of the optimizer": value
        for key, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Refuse to keep a state with a NaN or infinity in it."""
    bad = [key for key, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise DivergedError(f"after step {step} these tensors are not finite: {some(bad)}. Lower lr, or use a warm-up")


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(map(repr, names[:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
