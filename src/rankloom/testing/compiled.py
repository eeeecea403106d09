"""`torch.compile`: the same answers, and no recompilation while only tensors change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rankloom.testing.subject import Subject, nudge, trained


class Counter:
    """A backend that runs the graph as it is and counts how many were made."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        return graph.forward


def compile(subject: Subject) -> None:
    """compiled, whole where the base is, it answers as it does uncompiled"""
    with _fresh():
        whole = _compiles_whole(subject)
        model, bank = subject.nudged()
        said = subject.output(model)
        with bank.using():
            base = subject.output(model)
        fast = _compiled(model, Counter(), whole)
        subject.near(subject.output(fast), said, "compiled against uncompiled")
        with bank.using():
            subject.near(subject.output(fast), base, "compiled inside `with bank.using():` against the base")
        subject.near(subject.output(fast), said, "compiled, after the block")


def recompiles(subject: Subject) -> None:
    """compiled once, it follows new tensors and new weights without compiling again"""
    with _fresh():
        model, bank = subject.nudged()
        counter = Counter()
        fast = _compiled(model, counter, _compiles_whole(subject))
        bank.use(default=torch.tensor(0.5))
        for _ in range(2):
            subject.output(fast)
        graphs = counter.graphs
        for number, weight in enumerate((0.25, -1.0, 2.0)):
            bank.use(default=torch.tensor(weight))
            nudge(trained(bank, "default"), seed=number)
            subject.near(subject.output(fast), subject.output(model), f"compiled at weight tensor({weight})")
            assert counter.graphs == graphs, (
                f"compiled again for weight tensor({weight}): {counter.graphs - graphs} new graphs; a number or a list "
                "in the adapter changes from call to call"
            )


@contextmanager
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


def _compiles_whole(subject: Subject) -> bool:
    """True where the base alone compiles without a graph break."""
    try:
        subject.output(_compiled(subject.model().requires_grad_(False), Counter(), True))
    except Exception:
        return False
    finally:
        torch._dynamo.reset()
    return True


def _compiled(model: nn.Module, backend: Counter, whole: bool) -> nn.Module:
    compiled: nn.Module = torch.compile(model, backend=backend, fullgraph=whole)  # type: ignore[assignment]
    return compiled
