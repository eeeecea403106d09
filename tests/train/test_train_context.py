"""Columns of a batch that gates are told by `fit`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from noting import Noting
from torch import nn
from train_world import llama, points, texts

import rankloom as rl
from rankloom.core.rule import Rule
from rankloom.errors import SettingsError
from rankloom.train.fit import fit
from rankloom.train.settings import TrainSettings


class Reads(Rule):
    """Keeps what adapters saw of the context."""

    reads = ("context/task", "context/attention_mask")

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def loss(self, run, loss):
        self.seen.append({kind: dict(run.notes[kind]) for kind in self.reads})
        assert len(run.notes["context/task"]) == 2
        return loss


def tasks(n: int = 3) -> list[dict[str, torch.Tensor]]:
    rows = texts(n)
    for i, batch in enumerate(rows):
        batch["task"] = torch.tensor([i, i + 1])
    return rows


def noting(targets: Any = ("q_proj",)) -> nn.Module:
    model = llama()
    torch.manual_seed(1)
    rl.attach(model, Noting(r=2), target_modules=list(targets))
    return model


@pytest.mark.parametrize("settings", [False, True])
def test_columns_reach_every_pass(settings):
    """Each batch's own column, in training and in evaluation; the model is not called with what it does not take."""
    model, rule = noting(), Reads()
    more: dict[str, Any] = {"steps": 3, "context": ("task", "attention_mask")}
    if settings:
        more = {"settings": TrainSettings(steps=3, context=("task", "attention_mask"))}
    fit(model, tasks(), rules=[rule], evaluate=tasks(2), **more)
    for i, seen in enumerate(rule.seen):
        assert all(t.tolist() == [i, i + 1] for t in seen["context/task"].values())
        assert all(t.shape == (2, 9) for t in seen["context/attention_mask"].values())
    assert not model._forward_hooks
    assert not model.rankloom.selector.current().context


def test_a_loss_that_calls_with_a_part_of_the_batch():
    """The column comes from the batch in hand where the call has it not; the loss sees the whole batch."""

    def loss(model, batch):
        assert "task" in batch
        return model(input_ids=batch["input_ids"]).logits.square().mean()

    rule = Reads()
    fit(noting(), tasks(), steps=2, rules=[rule], loss=loss, context=("task",))
    assert next(iter(rule.seen[1]["context/task"].values())).tolist() == [1, 2]


def test_recomputed_layers_see_the_same_columns():
    """Gradient checkpointing: a gate that reads the context has the same gradients."""
    from dataclasses import dataclass

    from rankloom.methods.lora import LoRAAdapter

    class ByTask(LoRAAdapter):
        def forward(self, x, y, base):
            return super().forward(x, y, base) * base.context["task"][:, None, None].to(y)

        def thin(self, base, x):
            return super().thin(base, x) if x is None or "task" not in base.context else None

    @dataclass(frozen=True)
    class Tasked(rl.LoRA):
        def build(self, site):
            return ByTask(site, self)

    each = []
    for on in (False, True):
        model = llama()
        torch.manual_seed(1)
        rl.attach(model, Tasked(r=2), target_modules=["q_proj", "up_proj"])
        settings = TrainSettings(steps=3, lr=1e-2, gradient_checkpointing=on, context=("task",), accumulate=2)
        each.append(fit(model, tasks(), settings=settings).losses)
    assert each[0] == pytest.approx(each[1], abs=1e-5)


def test_a_missing_column_is_refused():
    """Not silent: the columns that there are, and the near one."""
    with pytest.raises(SettingsError, match=r"'tasks'.*'input_ids', 'labels', 'attention_mask', 'task'"):
        fit(noting(), tasks(), steps=1, context=("tasks",))
    model = nn.Sequential(nn.Linear(6, 3))
    rl.attach(model, rl.LoRA(r=1), target_modules=["0"])
    with pytest.raises(SettingsError, match=r"no column 'task'; it has none"):
        fit(model, points(1), steps=1, context=("task",))


def test_said_twice_is_refused():
    """Not silent: another context in settings."""
    with pytest.raises(SettingsError, match="context"):
        fit(noting(), tasks(), settings=TrainSettings(context=("task",)), context=("attention_mask",))
