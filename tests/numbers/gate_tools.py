"""Models with blocks, members of a blend, and a rule's penalty on one pass, for the tests of gates."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import rankloom as rl
from rankloom.core.bank import Bank
from rankloom.core.notes import Notes
from rankloom.core.rule import Rule

D = 8


class Mlp(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, 2 * d, bias=False)
        self.up_proj = nn.Linear(d, 2 * d, bias=False)
        self.down_proj = nn.Linear(2 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """q, k, v, o of causal attention, then the MLP: seven projections."""

    def __init__(self, d: int) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(d, d, bias=False))
        self.mlp = Mlp(d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        x = x + self.o_proj((q @ k.mT).masked_fill(~past, float("-inf")).softmax(-1) @ v)
        return x + self.mlp(x)


class Tower(nn.Module):
    """Blocks between states of width d; the head tells the width."""

    def __init__(self, d: int = D, blocks: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(d) for _ in range(blocks))
        self.head = nn.Linear(d, d, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tower(seed: int = 0, **settings: Any) -> Tower:
    torch.manual_seed(seed)
    return Tower(**settings).double().eval()


def shake(bank: Bank, name: str, seed: int, std: float = 0.3) -> None:
    """Move every tensor of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter, _ in bank.tensors(name):
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)


def members(model: nn.Module, *methods: Any, targets: Any = SEVEN) -> Bank:
    """Adapters a, b, … of these methods, moved from their start."""
    for number, method in enumerate(methods):
        name = "abcdef"[number]
        bank = rl.attach(model, method, name, target_modules=targets)
        shake(bank, name, 10 + number)
    return bank


def penalty(bank: Bank, rule: Rule, batch: Any, call: Callable[[], Any]) -> Tensor:
    """What a rule adds to a loss of 0 in the pass that `call` makes."""
    bank.selector.notes = notes = Notes(rule.reads)
    try:
        output = call()
    finally:
        bank.selector.notes = None
    return rule.loss(SimpleNamespace(bank=bank, batch=batch, output=output, notes=notes), torch.zeros(()))
