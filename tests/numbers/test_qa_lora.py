"""QA-LoRA (arXiv 2309.14717): a group-wise change that merges into the zero points without loss."""

from __future__ import annotations

import pytest
import torch
from number_tools import Net, count, drive, linear, nudge, only, stage
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankloom as rl
from rankloom.errors import SettingsError, StateError, TargetError
from rankloom.methods.qalora import QALoRA
from rankloom.store import dense
from rankloom.store.base import Packed
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform

pools = pytest.mark.parametrize("pool", ["sum", "mean"])


def _packed(pool, bits=4, group=8, r=3, in_=32, out=10, **settings):
    model = linear(in_, out)
    keep(model, {"fc.weight": Uniform(bits, group)})
    bank = rl.attach(model, QALoRA(r=r, lora_alpha=6, group_size=group, pool=pool, **settings))
    return model, bank, only(bank)


@pools
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_merges_without_loss(pool, bits):
    """Must hold: the merged quantised layer equals the unmerged output to 1e-13 in float64; codes and scales unchanged."""
    model, bank, adapter = _packed(pool, bits)
    nudge(bank)
    x = torch.randn(4, 32).double()
    spoken, before = model(x), model.fc.weight
    merged = adapter.merged(bank.sites("default")[0].base)
    assert isinstance(merged, Packed)
    assert torch.equal(merged.parts["codes"], before.parts["codes"])
    assert torch.equal(merged.parts["scale"], before.parts["scale"])
    assert (merged.parts["zero"] != before.parts["zero"]).all()
    assert merged.stored_bytes == before.stored_bytes
    rl.detach(model)
    silent = model(x)
    model.fc.weight = nn.Parameter(merged, requires_grad=False)
    assert (model(x) - spoken).abs().max() < 1e-13
    assert (silent - spoken).abs().max() > 0.1


@pools
def test_equation_by_hand(pool):
    """Mechanism: y = W x + b + s B A p on numbers that can be worked out on paper; the merge of the zero points too."""
    model = linear(4, 1)
    with torch.no_grad():
        model.fc.weight.copy_(torch.tensor([[0.0, 3.0, 10.0, 16.0]]))
        model.fc.bias.fill_(100.0)
    keep(model, {"fc.weight": Uniform(2, 2)})
    bank = rl.attach(model, QALoRA(r=1, lora_alpha=5, group_size=2, pool=pool))
    adapter = only(bank)
    with torch.no_grad():
        adapter.A.copy_(torch.tensor([[1.0, -2.0]]))
        adapter.B.fill_(3.0)
    x = torch.tensor([[1.0, 2.0, 4.0, 6.0]]).double()
    share = 1.0 if pool == "sum" else 0.5
    change = 5 * 3 * (1 * (1 + 2) - 2 * (4 + 6)) * share
    assert model(x).item() == pytest.approx(100 + 6 + 40 + 96 + change)
    parts = adapter.merged(bank.sites("default")[0].base).parts
    assert parts["scale"].tolist() == [[1.0, 2.0]]  # 3/3 and 6/3
    assert parts["zero"].tolist() == [[0 - 15 * share / 1, -5 + 30 * share / 2]]


@pools
def test_change_is_constant_in_groups(pool):
    """Must hold: ΔW is constant within each (row, group); delta equals forward; rank at most min(r, groups)."""
    model, bank, _ = _packed(pool, r=6, group=8)
    nudge(bank)
    delta = bank.delta("default")["fc"]
    groups = delta.unflatten(1, (-1, 8))
    assert torch.equal(groups, groups[..., :1].expand_as(groups))
    assert torch.linalg.matrix_rank(delta) == 4  # 32 / 8 groups below r = 6
    x = torch.randn(2, 5, 32).double()
    assert torch.allclose(model(x) - nn.functional.linear(x, dense(model.fc.weight), model.fc.bias), x @ delta.T)


@pools
def test_count_identity_and_dense_merge(pool):
    """Must hold: r(G + o) numbers; identity at start; on a dense base it merges as any method; xavier start."""
    model, x = linear(32, 10), torch.randn(4, 32).double()
    before = model(x)
    bank = rl.attach(model, QALoRA(r=3, group_size=8, pool=pool))
    assert count(bank) == 3 * (32 // 8 + 10)
    assert torch.equal(model(x), before)
    bound = (6 / (3 + 4)) ** 0.5
    assert 0.5 * bound < only(bank).A.abs().max() <= bound
    nudge(bank)
    spoken = model(x)
    bank.merge("default")
    assert torch.allclose(model(x), spoken, atol=1e-12)


def test_groups_of_one_are_lora():
    """Must hold: L = 1 equals LoRA with the same factors, in both pool modes."""
    x = torch.randn(4, 6).double()
    model = linear()
    lora = only(rl.attach(model, rl.LoRA(r=2, lora_alpha=3)))
    nudge(model.rankloom)
    for pool in ("sum", "mean"):
        other = linear()
        other.load_state_dict(model.state_dict(), strict=False)
        adapter = only(rl.attach(other, QALoRA(r=2, lora_alpha=3, group_size=1, pool=pool)))
        with torch.no_grad():
            adapter.A.copy_(lora.A)
            adapter.B.copy_(lora.B)
        assert torch.allclose(other(x), model(x), atol=1e-13)


def test_the_factor_is_the_group_size():
    """Pitfall: the two pools differ by the group size, not by the number of groups."""
    outputs = {}
    for pool in ("sum", "mean"):
        torch.manual_seed(4)
        _, bank, _ = _packed(pool, group=8)
        torch.manual_seed(5)
        nudge(bank)
        outputs[pool] = bank.delta("default")["fc"]
    assert torch.allclose(outputs["sum"], 8 * outputs["mean"], rtol=1e-12)


def test_learns_a_planted_change():
    """A planted group-constant change of rank 2 is learned on the 4-bit base; the base's bytes stay."""
    model, bank, adapter = _packed("mean", r=2, group=8)
    codes = model.fc.weight.parts["codes"].clone()
    x = torch.randn(64, 32).double()
    planted = (torch.randn(10, 2) @ torch.randn(2, 4)).double().repeat_interleave(8, 1) / 4
    target = model(x).detach() + x @ planted.T
    run = stage(model, 300, torch.optim.Adam([p for _, p, _ in bank.trainable()], lr=0.05))
    losses = drive(run, bank.plans["default"].method.rules(), lambda: (model(x) - target).square().mean())
    assert losses[-1] < 1e-3 * losses[0]
    assert torch.equal(model.fc.weight.parts["codes"], codes)
    assert torch.allclose(
        adapter.merged(bank.sites("default")[0].base).unpack(), dense(model.fc.weight) + planted, atol=0.1
    )


def test_dropout_acts_on_what_was_pooled():
    """As in the released code: a pooled number is kept and grown, or dropped, as one."""
    model = linear(4, 1, bias=False)
    adapter = only(rl.attach(model, QALoRA(r=1, lora_alpha=1, group_size=4, pool="sum", lora_dropout=0.5)))
    with torch.no_grad():
        adapter.A.fill_(1.0)
        adapter.B.fill_(1.0)
        model.fc.weight.zero_()
    x = torch.ones(100, 4).double()
    assert set(model(x).flatten().tolist()) == {0.0, 8.0}
    assert set(model.eval()(x).flatten().tolist()) == {4.0}


def test_gpt2_layers():
    """transformers' Conv1D: the change is right; its packed layout runs along the outputs, so only the dense merge is there."""
    model, x = Net(layer=Conv1D(10, 32)), torch.randn(4, 32)
    bank = rl.attach(model, QALoRA(r=2, group_size=8), target_modules=["layer"])
    nudge(bank)
    spoken = model(x)
    bank.merge("default")
    assert torch.allclose(model(x), spoken, atol=1e-5)


def test_refuses_by_name():
    with pytest.raises(TargetError, match="'fc' has 6 columns, not a multiple of group_size=4"):
        rl.attach(linear(), QALoRA(r=2, group_size=4))
    with pytest.raises(TargetError, match=r"'layer' \(embedding\) is no linear layer"):
        rl.attach(Net(layer=nn.Embedding(8, 4)), QALoRA(r=2, group_size=2), target_modules=["layer"])
    with pytest.raises(SettingsError, match="group_size=0"):
        QALoRA(group_size=0)
    model = linear(32, 10)
    bank = rl.attach(model, QALoRA(r=2, group_size=8))
    base = bank.sites("default")[0].base
    with pytest.raises(StateError, match="'fc' is not packed"):
        only(bank).merged(base)
    keep(model, {"fc.weight": Uniform(4, 16)})
    with pytest.raises(SettingsError, match="groups of 16"):
        only(bank).merged(base)
    model.fc.weight = nn.Parameter(NormalFloat().pack(dense(model.fc.weight)), requires_grad=False)
    with pytest.raises(SettingsError, match="zero points"):
        only(bank).merged(base)
