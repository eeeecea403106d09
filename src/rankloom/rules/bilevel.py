"""Two levels: some roles are trained on one stream, the others so that the first, once trained, do well on another.

Lower level: min over V of L₁(V, E) on the stream `lower`; upper level: min over E of L₂(V*(E), E) on `upper`. V*(E) is
approximated by `unroll` gradient steps V' = V − ξ ∇_V L₁. The hypergradient is ∇_E L₂(V', E), and with finite
differences − ξ [∇_E L₁(V⁺) − ∇_E L₁(V⁻)]/2ε beside it, V^± = V ± ε ∇_V' L₂, ε = 0.01/‖∇_V' L₂‖
(Liu et al., ICLR 2019, arXiv 1806.09055 eq. 7–8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankloom.core.rule import Rule, Run
from rankloom.errors import SettingsError
from rankloom.optim.state import optimizer_state, restore_optimizer
from rankloom.settings import Count, Positive

RADIUS = 0.01
Form = Literal["first", "finite_difference"]
Loss = Callable[[], Tensor]


@dataclass
class Bilevel(Rule):
    """Tensors with an `upper` role are stepped by an AdamW of their own (`lr`) along the hypergradient, after each step
    of the rest; they get no gradient from the stream `lower`, and the rest none from `upper`.

    `unroll`: steps of V'; `hypergrad`: with or without the second term. ξ is the learning rate of the rest. Needs
    `fit(batches={"lower": …, "upper": …}, loss=…)` with a loss of the stream `lower`, and a model whose output has a
    `loss` for a batch.
    """

    upper: tuple[str, ...] = ("singular",)
    lr: Positive = 1e-3
    unroll: Count = 1
    hypergrad: Form = "finite_difference"
    _optimizer: torch.optim.Optimizer | None = field(default=None, init=False, repr=False, compare=False)
    _batches: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def lower_penalty(self, run: Run) -> Tensor | float:
        """Added to L₁."""
        return 0.0

    def upper_penalty(self, run: Run) -> Tensor | float:
        """Added to L₂."""
        return 0.0

    def start(self, run: Run) -> None:
        """Make the upper level's optimizer. Refuses a run where one of the levels has no tensor."""
        upper, lower = self._levels(run)
        if not upper or not lower:
            raise SettingsError(
                f"two levels need tensors with the roles {', '.join(self.upper)} and others beside them, such as "
                "BiLoRA(r=8) has"
            )
        self._optimizer = torch.optim.AdamW(list(upper.values()), lr=self.lr, weight_decay=0.0)
        self._batches = []

    def before_step(self, run: Run) -> None:
        """Forget the batches of the last step."""
        self._batches = []

    def loss(self, run: Run, loss: Tensor) -> Tensor:
        """L₁ with its penalty. Refuses a batch that is not of two streams."""
        batch = run.batch
        if not isinstance(batch, Mapping) or not {"lower", "upper"} <= batch.keys():
            raise SettingsError(
                f"{type(self).__name__} reads two streams: fit(model, split_streams(data, lower=0.8, upper=0.2), "
                "loss=SFT('lower')), with rankloom.train.named.split_streams and rankloom.objectives.sft.SFT; a "
                "Trainer has one stream only. Or train both levels together: hypergrad='none'"
            )
        self._batches.append(batch)
        return loss + self.lower_penalty(run)

    def after_backward(self, run: Run) -> None:
        """The upper level learns nothing from the stream `lower`."""
        for parameter in self._levels(run)[0].values():
            parameter.grad = None

    def after_step(self, run: Run) -> None:
        """Step the upper level."""
        upper, lower = self._levels(run)
        assert self._optimizer is not None
        gradients = hypergradient(
            lambda: self._mean(run, "lower") + self.lower_penalty(run),
            lambda: self._mean(run, "upper") + self.upper_penalty(run),
            list(lower.values()),
            list(upper.values()),
            xi=float(run.optimizer.param_groups[0]["lr"]),
            unroll=self.unroll,
            form=self.hypergrad,
        )
        for parameter, gradient in zip(upper.values(), gradients):
            parameter.grad = gradient
        self._optimizer.step()
        self._batches = []

    def state(self) -> dict[str, Any]:
        """The upper level's optimizer."""
        assert self._optimizer is not None
        return {"optimizer": optimizer_state(self._optimizer, self._keyed())}

    def restore(self, state: dict[str, Any]) -> None:
        """Take it back."""
        assert self._optimizer is not None
        restore_optimizer(self._optimizer, self._keyed(), state["optimizer"])

    def _keyed(self) -> dict[str, nn.Parameter]:
        assert self._optimizer is not None
        return {str(i): p for i, p in enumerate(self._optimizer.param_groups[0]["params"])}

    def _levels(self, run: Run) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        roles = {id(p): role for _, p, role in run.bank.trainable()}
        found: tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]] = ({}, {})
        for key, parameter in run.parameters.items():
            found[roles.get(id(parameter)) not in self.upper][key] = parameter
        return found

    def _mean(self, run: Run, stream: str) -> Tensor:
        each = [self._of_output(run.forward(batch[stream], *run.bank.active)) for batch in self._batches]
        return torch.stack(each).mean()

    def _of_output(self, output: Any) -> Tensor:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            raise SettingsError(
                f"{type(self).__name__}: the model gives no loss for a batch of its streams: put 'labels' into them"
            )
        return loss


def hypergradient(
    lower_loss: Loss,
    upper_loss: Loss,
    lower: Sequence[nn.Parameter],
    upper: Sequence[nn.Parameter],
    xi: float,
    unroll: int = 1,
    form: Form = "finite_difference",
) -> list[Tensor]:
    """Gradient of L₂(V'(E), E) with respect to E, the tensors `upper`; V are the tensors `lower`.

    The losses read the tensors as they stand. These are moved on the way and are bitwise as before in the end.
    """
    start = [p.detach().clone() for p in lower]
    points: list[list[Tensor]] = []
    try:
        for _ in range(unroll):
            points.append([p.detach().clone() for p in lower])
            _put(lower, points[-1], _gradients(lower_loss(), lower), -xi)
        found = _gradients(upper_loss(), [*upper, *lower])
        direct, slope = found[: len(upper)], found[len(upper) :]
        for point in reversed(points) if form == "finite_difference" else ():
            mixed = _second(lower_loss, lower, upper, point, slope)
            direct = [g - xi * m for g, m in zip(direct, mixed)]
            slope = [g - xi * m for g, m in zip(slope, mixed[len(upper) :])]
    finally:
        _put(lower, start)
    return direct


def _second(
    loss: Loss, lower: Sequence[nn.Parameter], upper: Sequence[nn.Parameter], point: list[Tensor], slope: list[Tensor]
) -> list[Tensor]:
    """Derivative of ∇L₁, by E and by V, along `slope` at `point`; by central differences."""
    length = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in slope])))
    if not length:
        return [torch.zeros_like(p) for p in (*upper, *lower)]
    step, sides = RADIUS / length, []
    for sign in (1.0, -1.0):
        _put(lower, point, slope, sign * step)
        sides.append(_gradients(loss(), [*upper, *lower]))
    return [(plus - minus) / (2 * step) for plus, minus in zip(*sides)]


@torch.no_grad()
def _put(
    tensors: Sequence[nn.Parameter], values: Sequence[Tensor], moves: Sequence[Tensor] = (), times: float = 0.0
) -> None:
    for i, (tensor, value) in enumerate(zip(tensors, values)):
        tensor.copy_(value + times * moves[i] if moves else value)


def _gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found)]
