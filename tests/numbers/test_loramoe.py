"""LoRAMoE (arXiv 2312.09979): a softmax over LoRA experts, and balancing by the type of the data."""

from __future__ import annotations

import pytest
import torch
from gate_tools import penalty
from number_tools import linear, nudge, only

import rankloom as rl
from rankloom.core.notes import Notes
from rankloom.errors import StateError
from rankloom.rules.balance import Balance, TypeBalance


class _Run:
    def __init__(self, gates, batch, **more):
        self.notes = Notes(("router", "experts"))
        for site, soft in gates.items():
            self.notes.put("router", site, soft)
        for site, ids in more.items():
            self.notes.put("experts", site, ids)
        self.batch = batch


def _local(gates, types, weight=1.0, delta=0.5, **batch):
    return TypeBalance(weight, delta).loss(_Run({"a": gates}, {"task_types": types, **batch}), torch.zeros(()))


def _masses(rows, tokens=4):
    """Router weights (rows, tokens, n) whose sums over tokens are `rows`."""
    return (torch.tensor(rows).float() / tokens)[:, None].repeat(1, tokens, 1)


def test_identity_and_dense_molora_without_the_constraint():
    """Must hold (1, 2): identity at start; with β = 0 it is dense MoLoRA, tensor for tensor."""
    model, x = linear(7, 6), torch.randn(3, 7).double()
    before = model(x)
    bank = rl.attach(model, rl.loramoe(n=4, r=2, lora_dropout=0.0, blc_weight=0.0))
    assert torch.equal(model(x), before)
    nudge(bank)
    twin = linear(7, 6)
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    other = rl.attach(twin, rl.molora(n=4, r=2, lora_alpha=32.0))
    only(other).load_state_dict(only(bank).state_dict())
    assert torch.equal(model(x), twin(x))
    loss = torch.ones(())
    run = _Run({"fc": torch.rand(2, 3, 4)}, {"task_types": torch.tensor([0, 1])})
    assert rl.loramoe(blc_weight=0.0).rules[0].loss(run, loss) is loss


def test_the_constraint_by_hand():
    """Must hold (3): zero iff Q ∘ I is constant, so more goes to the experts of the smaller coefficient; 0.286 if even."""
    types = torch.tensor([0, 1])
    assert _local(_masses([[3, 3, 1, 1], [1, 1, 3, 3]]), types).item() == pytest.approx(0, abs=1e-6)
    assert _local(_masses([[2, 2, 2, 2], [2, 2, 2, 2]]), types).item() == pytest.approx(2 / 7, abs=1e-4)
    assert _local(_masses([[1, 1, 3, 3], [3, 3, 1, 1]]), types).item() > 0.5


def test_without_delta_it_is_the_squared_coefficient_of_variation():
    """Must hold (4)."""
    soft = torch.rand(3, 5, 4)
    mass = soft.sum(1)
    wanted = mass.var() / mass.mean() ** 2
    assert torch.allclose(_local(soft, torch.tensor([0, 1, 0]), delta=0.0), wanted)


def test_without_types_nothing_is_added():
    """Must hold (5)."""
    assert _local(torch.rand(2, 3, 4), None).item() == 0
    run = _Run({"a": torch.rand(2, 3, 4)}, {})
    assert TypeBalance().loss(run, torch.ones(())).item() == 1


def test_padding_does_not_count():
    """Pitfall: the original counts padding tokens in Q."""
    soft, mask = torch.rand(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    other = torch.where(mask[..., None].bool(), soft, torch.rand(2, 5, 4))
    types = torch.tensor([0, 1])
    assert torch.equal(_local(soft, types, attention_mask=mask), _local(other, types, attention_mask=mask))
    assert not torch.equal(_local(soft, types), _local(other, types))
    switch = [Balance().loss(_Run({"a": s}, {"attention_mask": mask}), torch.zeros(())) for s in (soft, other)]
    assert torch.equal(*switch)
    with pytest.raises(StateError, match=r"'a' weighs \(2, 5\) tokens.*\(3, 5\)"):
        _local(soft, types, attention_mask=mask[:1].repeat(3, 1))


def test_bad_types_are_refused():
    with pytest.raises(StateError, match="one type for each row"):
        _local(torch.rand(2, 3, 4), torch.tensor([0, 1, 1]))
    with pytest.raises(StateError, match="even number of experts"):
        _local(torch.rand(2, 3, 3), torch.tensor([0, 1]))


def test_switch_balance_is_one_when_even_and_n_at_collapse():
    """Balance: N Σ f P is 1 at uniform, N where one expert takes all with probability 1; routers add up."""
    even = torch.full((2, 6, 4), 0.25)
    ids = torch.arange(12).reshape(2, 6, 1) % 4
    all_one = torch.zeros(2, 6, 4)
    all_one[..., 2] = 1
    zero = torch.zeros(())
    assert Balance(1.0).loss(_Run({"a": even}, {}, a=ids), zero).item() == pytest.approx(1)
    assert Balance(1.0).loss(_Run({"a": all_one}, {}), zero).item() == pytest.approx(4)
    assert Balance(0.5).loss(_Run({"a": even, "b": all_one}, {}, a=ids), zero).item() == pytest.approx(2.5)
    two = torch.stack([torch.arange(12) % 4, (torch.arange(12) + 1) % 4], -1).reshape(2, 6, 2)
    assert Balance(1.0).loss(_Run({"a": even}, {}, a=two), zero).item() == pytest.approx(1)


def test_types_part_the_halves_in_training():
    """Must hold (6): with β > 0 the mean weight of a half depends on the type; with δ = 0 the experts stay even."""
    torch.manual_seed(0)
    types = torch.arange(16) % 2
    x = torch.randn(16, 4, 7).double() + 2 * (2 * types - 1).double()[:, None, None] * torch.eye(7).double()[0]
    halves, spread = {}, {}
    for delta in (0.5, 0.0):
        torch.manual_seed(1)
        model = linear(7, 6)
        bank = rl.attach(model, rl.loramoe(n=4, r=2, lora_dropout=0.0, blc_weight=1.0, blc_alpha=delta))
        nudge(bank, 0.1)
        rule = bank.plans["default"].rules[0]
        optimizer = torch.optim.Adam([p for _, p, _ in bank.trainable()], lr=3e-2)
        for _ in range(150):
            optimizer.zero_grad()
            penalty(bank, rule, {"task_types": types}, lambda model=model: model(x)).backward()
            optimizer.step()
        soft = only(bank).weights(x, bank.sites("default")[0].base).detach()
        first = soft[..., :2].sum(-1).mean(1)
        halves[delta] = (first[types == 0].mean() - first[types == 1].mean()).item()
        mass = soft.sum(1)
        spread[delta] = (mass.var() / mass.mean() ** 2).item()
    assert halves[0.5] > 0.3, halves
    assert spread[0.0] < 0.02, spread
