"""LoftQ, LQ and LQER as starts of an attached LoRA, and merges that stay packed."""

import pytest
import torch
from torch import nn

import rankloom as rl
from rankloom.errors import TargetError
from rankloom.methods.qalora import QALoRA
from rankloom.starts.split import LQ, LQER, LoftQ, split_base
from rankloom.store import dense
from rankloom.store.base import Packed
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 96), nn.Tanh(), nn.Linear(96, 64))


@pytest.mark.parametrize("how", [LoftQ(), LQ(), LQER()])
def test_split(how):
    model, x = net(), torch.randn(8, 128)
    before = model(x).detach()
    w = model[0].weight.detach().clone()
    qlora = net()
    keep(qlora, {"0.weight": NormalFloat(2), "2.weight": NormalFloat(2)})
    bank = rl.attach(model, rl.LoRA(r=16, lora_alpha=32))
    splits = split_base(bank, how, NormalFloat(2))
    assert isinstance(model[0].weight, Packed)
    ad = bank.sites("default")[0].adapter
    got = (w - dense(model[0].weight) - 2.0 * ad.B @ ad.A).norm().item()
    assert got == pytest.approx(splits["0"].error, rel=1e-3)
    assert (model(x) - before).norm() < 0.9 * (qlora(x) - before).norm()
    spoken = model(x)
    bank.merge("default")
    assert torch.allclose(model(x), spoken, atol=1e-5)
    bank.unmerge()
    rl.detach(model)
    assert isinstance(model[0].weight, Packed)


def test_zero_rounds_is_qlora():
    model = net()
    bank = rl.attach(model, rl.LoRA(r=4))
    a = bank.sites("default")[0].adapter.A.detach().clone()
    split_base(bank, LoftQ(iters=0), NormalFloat())
    assert torch.equal(bank.sites("default")[0].adapter.A, a)
    assert not bank.sites("default")[0].adapter.B.any()


def test_refuses():
    model = net()
    bank = rl.attach(model, rl.DoRA())
    with pytest.raises(TargetError):
        split_base(bank, LoftQ(), NormalFloat())
    assert not isinstance(model[0].weight, Packed)


def test_merge_into_store():
    for method, lossless in ((QALoRA(r=4, group_size=32), True), (rl.LoRA(r=4), False)):
        model, x = net().double(), torch.randn(8, 128).double()
        keep(model, {"0.weight": Uniform(4, 32), "2.weight": Uniform(4, 32)})
        bank = rl.attach(model, method)
        with torch.no_grad():
            for _, p, _ in bank.trainable():
                p.add_(torch.randn_like(p) * 0.1)
        spoken, packed = model(x), model[0].weight
        lost = bank.merge("default", into="store")
        assert isinstance(model[0].weight, Packed)
        assert set(lost) == {"0", "2"}
        assert (max(lost.values()) < 1e-12) == lossless
        assert ((model(x) - spoken).abs().max() < 1e-12) == lossless
        bank.unmerge()
        assert model[0].weight is packed
