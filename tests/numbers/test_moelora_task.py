"""MOELoRA (arXiv 2310.18339): rank r in n experts, weighed by the task of the row."""

from __future__ import annotations

import pytest
import torch
from number_tools import count, linear, nudge, only

import rankloom as rl
from rankloom.errors import SettingsError

SMALL = {"task_num": 3, "n": 4, "r": 8, "task_embedding_dim": 5, "lora_alpha": 16.0}


def _moved(**settings):
    torch.manual_seed(0)
    model = linear(7, 6)
    bank = rl.attach(model, rl.moelora_task(**{**SMALL, **settings}))
    nudge(bank)
    return model, bank, only(bank)


def _weights(adapter, task):
    table = adapter.gate.table
    return torch.softmax(table.scores.weight.float() @ table.embedding[task].float(), 0).double()


def _matrix(adapter, task):
    """(α/r) Σ ω_i B_i A_i with r the total rank."""
    experts = adapter.experts
    return 16 / 8 * torch.einsum("n,nor,nri->oi", _weights(adapter, task), experts.B, experts.A)


def test_identity_and_count():
    """Must hold (1, 2): expert parameters are those of LoRA of rank r, r(d_in + d_out); (K+1)d_T + N·d_T more."""
    model, x = linear(7, 6), torch.randn(3, 7).double()
    before = model(x)
    bank = rl.attach(model, rl.moelora_task(**SMALL))
    with bank.using("default", context={"task": 1}):
        assert torch.equal(model(x), before)
    assert count(bank) == 8 * (7 + 6) + (3 + 1) * 5 + 4 * 5
    assert count(rl.attach(linear(7, 6), rl.LoRA(r=8))) == 8 * (7 + 6)


def test_merged_for_a_task_is_what_the_task_says():
    """Must hold (3): merge(task) equals the unmerged forward with that id; unmerge restores W bit for bit."""
    model, bank, adapter = _moved()
    x, weight = torch.randn(5, 7).double(), model.fc.weight.detach().clone()
    for task in range(4):
        with bank.using("default", context={"task": task}):
            said = model(x)
        bank.merge(context={"task": task})
        assert torch.allclose(model(x), said, atol=1e-7)
        assert torch.allclose(model.fc.weight - weight, _matrix(adapter, task), atol=1e-7)
        bank.unmerge()
        assert torch.equal(model.fc.weight, weight)
    assert not torch.allclose(_matrix(adapter, 1), _matrix(adapter, 2), atol=1e-3)


def test_a_batch_of_many_tasks_equals_its_rows():
    """Must hold (4)."""
    model, bank, _ = _moved()
    x, tasks = torch.randn(4, 3, 7).double(), torch.tensor([2, 0, 3, 2])
    with bank.using("default", context={"task": tasks}):
        found = model(x)
    for row, task in enumerate(tasks):
        with bank.using("default", context={"task": int(task)}):
            assert torch.allclose(found[row], model(x[row : row + 1])[0], atol=1e-12)


def test_the_gate_does_not_look_at_the_input():
    """Must hold (5): the change is linear in x, so its derivative is the matrix of the task and nothing else."""
    model, bank, adapter = _moved()
    x = torch.randn(7).double()
    with bank.using("default", context={"task": 2}):
        found = torch.autograd.functional.jacobian(model, x)
    assert torch.allclose(found, model.fc.weight + _matrix(adapter, 2), atol=1e-7)


def test_one_expert_is_lora():
    """Must hold (6): N = 1 has weight 1, whatever the task."""
    model, bank, adapter = _moved(n=1)
    x = torch.randn(4, 7).double()
    with bank.using():
        base = model(x)
    with bank.using("default", context={"task": 3}):
        wanted = 2 * x @ adapter.experts.A[0].T @ adapter.experts.B[0].T
        assert torch.allclose(model(x) - base, wanted, atol=1e-12)


def test_a_rank_that_does_not_divide_is_refused():
    """Must hold (7)."""
    with pytest.raises(SettingsError, match="r=10 .*n=4 must divide"):
        rl.moelora_task(r=10, n=4)


def test_one_gate_for_all_sites_where_shared():
    """Interface: share_gate has one embedding and one map for the model."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 6))
    bank = rl.attach(model, rl.moelora_task(**SMALL, share_gate=True))
    assert count(bank) == 2 * 8 * 12 + 4 * 5 + 4 * 5
    one, two = (site.adapter.gate for site in bank.sites("default"))
    assert one.table is two.table


def test_each_task_learns_its_own_change():
    """Planted: tasks with opposite changes. One LoRA of the same size is left with their mean, which is no change."""
    torch.manual_seed(0)
    x, tasks, plant = torch.randn(64, 7).double(), torch.arange(64) % 2 + 1, torch.randn(6, 7).double()
    sign = (2 * tasks - 3).double()[:, None]
    losses = {}
    for name, method in {
        "tasks": rl.moelora_task(**{**SMALL, "task_num": 2}),
        "lora": rl.LoRA(r=8, lora_alpha=16),
    }.items():
        torch.manual_seed(1)
        model = linear(7, 6)
        bank = rl.attach(model, method)
        with torch.no_grad(), bank.using():
            wanted = model(x) + sign * (x @ plant.T)
            base = (wanted - model(x)).square().mean().item()
        optimizer = torch.optim.Adam([p for _, p, _ in bank.trainable()], lr=2e-2)
        with bank.using("default", context={"task": tasks}):
            for _ in range(300):
                optimizer.zero_grad()
                loss = (model(x) - wanted).square().mean()
                loss.backward()
                optimizer.step()
        losses[name] = loss.item() / base
    assert losses["tasks"] < 0.1 < 0.5 < losses["lora"], losses
