"""Small models, a hand-driven run, and PEFT as an oracle, for the tests of this folder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import peft
import rankloom as rl
from rankloom.core.adapter import Adapter
from rankloom.core.bank import Bank
from rankloom.core.rule import Rule


class Net(nn.Module):
    """Layers side by side on one input: the outputs are concatenated on the last dim."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.heads = tuple(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in self.heads], dim=-1)


def linear(in_: int = 6, out: int = 5, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> Net:
    """One linear layer `fc`."""
    return Net(fc=nn.Linear(in_, out, bias=bias, dtype=dtype))


def only(bank: Bank, name: str = "default") -> Adapter:
    """The adapter of a bank that has one site."""
    (site,) = bank.sites(name)
    return site.adapter


def nudge(bank: Bank, std: float = 0.3, name: str = "default") -> None:
    """Move every trainable tensor, so that the change is not zero."""
    with torch.no_grad():
        for _, parameter, _ in bank.trainable(name):
            parameter.add_(torch.randn_like(parameter) * std)


def count(bank: Bank) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for _, p, _ in bank.trainable())


@dataclass
class Stage:
    """A `Run` in the hands of a test."""

    model: nn.Module
    bank: Bank
    optimizer: torch.optim.Optimizer
    total_steps: int
    step: int = 0


def stage(model: nn.Module, total_steps: int = 1, optimizer: torch.optim.Optimizer | None = None) -> Stage:
    """A run over the trainable tensors of `model`."""
    bank = model.rankloom
    optimizer = optimizer or torch.optim.SGD([p for _, p, _ in bank.trainable()], lr=1.0)
    return Stage(model, bank, optimizer, total_steps)


def drive(run: Stage, rules: Iterable[Rule], loss: Callable[[], Tensor]) -> list[float]:
    """Train to the end of the run in the order that `Rule` documents."""
    rules, losses = list(rules), []
    for rule in rules:
        rule.start(run)
    while run.step < run.total_steps:
        for rule in rules:
            rule.before_step(run)
        value = loss()
        losses.append(value.item())
        for rule in rules:
            value = rule.loss(run, value)
        value.backward()
        for rule in rules:
            rule.after_backward(run)
        run.optimizer.step()
        for rule in rules:
            rule.after_step(run)
        run.optimizer.zero_grad()
        run.step += 1
    for rule in rules:
        rule.finish(run)
    return losses


def minimise(parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], steps: int = 200) -> float:
    """The loss after L-BFGS with line search."""
    parameters = list(parameters)
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    return loss().item()


def pair(base: nn.Module, ours: Any, theirs: Any, **targets: Any) -> tuple[nn.Module, Any]:
    """The same base with our method and with a PEFT config attached."""
    wrapped = peft.get_peft_model(copy.deepcopy(base), theirs)
    model = copy.deepcopy(base)
    rl.attach(model, ours, **targets)
    return model, wrapped


def peft_state(bank: Bank, name: str = "default") -> dict[str, Tensor]:
    """Our tensors under PEFT's keys."""
    state = {}
    for site in bank.sites(name):
        for path, module in site.adapter.named_modules():
            assert isinstance(module, Adapter), path
            for own, theirs in type(module).peft_names.items():
                tensor = getattr(module, own)
                if tensor is not None:
                    state[f"base_model.model.{site.name}.{theirs}"] = tensor.detach().clone()
    return state


def hand_over(bank: Bank, wrapped: Any, **keys: str) -> None:
    """Give our tensors to PEFT; every adapter key must be taken. `keys` replaces parts of the keys."""
    state = peft_state(bank)
    for old, new in keys.items():
        state = {k.replace(old, new): v for k, v in state.items()}
    shapes = {k: v.shape for k, v in peft.get_peft_model_state_dict(wrapped).items()}
    state = {k: v.reshape(shapes.get(k, v.shape)) for k, v in state.items()}
    result = peft.set_peft_model_state_dict(wrapped, state)
    assert not result.unexpected_keys
    assert not [k for k in result.missing_keys if "lora_" in k or "vera_" in k]
