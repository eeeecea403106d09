"""Sequences of tasks: the matrix, its numbers, and going on after a break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rankloom as rl
from rankloom.continual.results import Results
from rankloom.continual.sequence import sequence
from rankloom.errors import SettingsError, StateError
from rankloom.train.fit import fit


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    rl.attach(made, rl.LoRA(r=4), target_modules=["0", "2"])
    return made


def tasks(n: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each task is a region of its own with a target of its own."""
    draw = torch.Generator().manual_seed(1)
    made = {}
    for i in range(n):
        x = torch.randn(24, 4, generator=draw) * 0.3 + 3 * torch.eye(4)[i]
        made[f"task {i}"] = (x, torch.full((24, 2), float(2 * i - 2)))
    return made


def score(net: nn.Module, name: str, task: Any) -> float:
    with torch.no_grad():
        return -float(nn.functional.mse_loss(net(task[0]), task[1]))


def train(net: nn.Module, name: str, task: Any, folder: Any) -> None:
    fit(net, [task], steps=40, lr=0.03)


def test_numbers_of_a_matrix():
    """average, forgetting, transfer both ways, by hand."""
    r = Results(("a", "b", "c"), (0.1, 0.2, 0.3), ((0.9, 0.4, 0.2), (0.7, 0.8, 0.5), (0.6, 0.9, 0.7)))
    assert r[0, 1] == 0.4
    assert r.average == pytest.approx((0.6 + 0.9 + 0.7) / 3)
    assert r.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.9)) / 2)
    assert r.backward_transfer == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)
    assert r.forward_transfer == pytest.approx(((0.4 - 0.2) + (0.5 - 0.3)) / 2)
    with pytest.raises(SettingsError, match="2 of 3 tasks"):
        Results(r.names, r.before, r.rows[:2]).average
    with pytest.raises(SettingsError, match="one finite number"):
        Results(("a",), (float("nan"),))


def test_a_sequence_learns_and_forgets():
    """Each task is learnt when it is trained; one adapter for all forgets; R[t, i] has every entry."""
    found = sequence(model(), tasks(), train, score)
    assert found.names == ("task 0", "task 1", "task 2")
    assert all(found[i, i] > found.before[i] + 0.3 for i in (0, 2))
    assert found.forgetting > 0.1
    assert found.average == pytest.approx(sum(found[2, i] for i in range(3)) / 3)


def test_it_goes_on_after_a_break(tmp_path):
    """Broken in the second task and called again with a fresh model: the same matrix, nothing trained twice."""
    straight = sequence(model(), tasks(), train, score)
    seen: list[str] = []

    def breaks(net, name, task, folder):
        seen.append(name)
        assert folder.parent == tmp_path
        if len(seen) == 2:
            raise RuntimeError("broken")
        train(net, name, task, folder)

    with pytest.raises(RuntimeError, match="broken"):
        sequence(model(), tasks(), breaks, score, out=tmp_path)
    again = sequence(model(), tasks(), breaks, score, out=tmp_path)
    assert seen == ["task 0", "task 1", "task 1", "task 2"]
    assert again == straight
    assert sequence(model(), tasks(), breaks, score, out=tmp_path) == straight
    assert len(seen) == 4
    with pytest.raises(StateError, match="another out="):
        sequence(model(), tasks(2), train, score, out=tmp_path)


def test_no_tasks():
    with pytest.raises(SettingsError, match="no tasks"):
        sequence(model(), {}, train, score)
