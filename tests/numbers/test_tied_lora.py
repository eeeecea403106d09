"""Tied-LoRA (arXiv 2311.09578): one trained pair for the layers of a shape, two vectors a layer."""

from __future__ import annotations

import copy

import pytest
import torch
from number_tools import Net, count, linear, nudge, only
from torch import nn

import rankloom as rl
from rankloom.errors import SettingsError, TargetError
from rankloom.methods.tied import TiedLoRA
from rankloom.methods.vera import VeRA


def layers(**shapes: tuple[int, int]) -> Net:
    return Net(**{name: nn.Linear(i, o, dtype=torch.float64) for name, (i, o) in shapes.items()})


def two() -> Net:
    return layers(p=(6, 5), q=(6, 5))


def sites(bank):
    return [adapter for _, adapter in bank.adapters()]


def test_equation_by_hand():
    """Mechanism: z_l = W_l x + (alpha/r) v_l ∘ B (u_l ∘ A x)."""
    model, x = two(), torch.randn(3, 6).double()
    before = model(x)
    bank = rl.attach(model, TiedLoRA(r=2, lora_alpha=6.0))
    nudge(bank)
    want = torch.cat([3 * a.v * ((a.u * (x @ a.A.T)) @ a.B.T) for a in sites(bank)], dim=-1)
    assert torch.allclose(model(x) - before, want, atol=1e-12)


def test_one_storage_and_one_optimizer_slot():
    """Must hold: layers share the storage of A and B, and an optimizer holds each once."""
    bank = rl.attach(two(), TiedLoRA(r=2))
    p, q = sites(bank)
    assert p.A.data_ptr() == q.A.data_ptr()
    assert p.B.data_ptr() == q.B.data_ptr()
    parameters = [p for _, p, _ in bank.trainable()]
    assert len(parameters) == len(set(map(id, parameters))) == 2 + 2 * 2
    assert sorted(r for _, _, r in bank.tensors("default")) == ["in", "out", "scale", "scale", "scale", "scale"]


def test_gradient_is_the_sum_of_untied_gradients():
    """Must hold: the gradient of A, and of B, is the sum over the layers of what untied copies get."""
    model, x = two(), torch.randn(3, 6).double()
    bank = rl.attach(model, TiedLoRA(r=2))
    nudge(bank)
    g = torch.randn(3, 10).double()
    (model(x) * g).sum().backward()
    sums = [torch.zeros(2, 6).double(), torch.zeros(5, 2).double()]
    for a, grad in zip(sites(bank), g.split(5, dim=-1)):
        own = [t.detach().clone().requires_grad_() for t in (a.A, a.B)]
        (4 * a.v.detach() * ((a.u.detach() * (x @ own[0].T)) @ own[1].T) * grad).sum().backward()
        sums = [total + t.grad for total, t in zip(sums, own)]
    shared = sites(bank)[0]
    assert torch.allclose(shared.A.grad, sums[0], atol=1e-12)
    assert torch.allclose(shared.B.grad, sums[1], atol=1e-12)


def test_one_layer_without_vectors_is_lora():
    """Must hold: L = 1 with u = v = 1 kept is LoRA: the same start from the same seed, change and gradients."""
    base, x, found = linear(), torch.randn(3, 6).double(), []
    for method in (TiedLoRA(r=2, train=("A", "B")), rl.LoRA(r=2)):
        model = copy.deepcopy(base)
        torch.manual_seed(3)
        adapter = only(rl.attach(model, method))
        torch.manual_seed(4)
        nudge(model.rankloom)
        out = model(x)
        out.square().sum().backward()
        found.append((out.detach(), adapter.A.grad, adapter.B.grad))
    for ours, lora in zip(*found):
        assert torch.allclose(ours, lora, atol=1e-12)


def test_only_vectors_is_vera_up_to_scale():
    """Must hold: train = {u, v} is VeRA with its pair, d = u and b = v, up to the scale."""
    base, x = two(), torch.randn(3, 6).double()
    tied, vera = copy.deepcopy(base), copy.deepcopy(base)
    ours = rl.attach(tied, TiedLoRA(r=4, lora_alpha=8.0, train=("u", "v")))
    theirs = rl.attach(vera, VeRA(r=4))
    assert not any(p.requires_grad for p in ours.shared_of("default").parameters())
    nudge(ours)
    with torch.no_grad():
        for a, b in zip(sites(ours), sites(theirs)):
            b.lambda_d.copy_(a.u)
            b.lambda_b.copy_(2 * a.v)
            b.A.copy_(a.A)
            b.B.copy_(a.B)
    assert torch.allclose(tied(x), vera(x), atol=1e-12)


def test_count():
    """Must hold: r(d + 3d) + L(r + 3d) on fused QKV with all trained; the subset's share with less."""
    d, r, n = 6, 2, 3
    shapes = {f"qkv{i}": (d, 3 * d) for i in range(n)}
    assert count(rl.attach(layers(**shapes), TiedLoRA(r=r))) == r * (d + 3 * d) + n * (r + 3 * d)
    assert count(rl.attach(layers(**shapes), TiedLoRA(r=r, train=("B", "u")))) == r * 3 * d + n * r
    assert count(rl.attach(layers(**shapes), TiedLoRA(r=r, train=("v",)))) == n * 3 * d


def test_a_vector_moves_its_own_layer_only():
    """Must hold: changing layer k's v changes no other layer."""
    model, x = two(), torch.randn(3, 6).double()
    bank = rl.attach(model, TiedLoRA(r=2))
    nudge(bank)
    before = model(x)
    with torch.no_grad():
        sites(bank)[1].v.add_(1)
    after = model(x)
    assert torch.equal(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5:], before[:, 5:])


@pytest.mark.parametrize("train", [("A", "B", "u", "v"), ("A", "B"), ("B",), ("v",), ("u", "v"), ("A", "u", "v")])
def test_identity_at_init(train):
    """Start: ΔW = 0 by B, or by v where B is kept; what can move has a gradient after the first step at the latest."""
    model, x = two(), torch.randn(3, 6).double()
    before = model(x)
    bank = rl.attach(model, TiedLoRA(r=2, train=train))
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for _, p, _ in bank.trainable())


def test_scopes():
    """Interface: one pair for the layers of a shape, of a shape and name, or of a group."""
    model = nn.ModuleDict({"0": layers(p=(6, 5), q=(6, 5), o=(6, 3)), "1": layers(p=(6, 5), q=(6, 5), o=(6, 3))})

    def pairs(scope) -> dict[str, int]:
        bank = rl.attach(copy.deepcopy(model), TiedLoRA(r=2, tie_scope=scope))
        return {name: adapter.A.data_ptr() for name, adapter in bank.adapters()}

    shape, name, groups = pairs("shape"), pairs("name"), pairs((("p", "o"), ("q",)))
    assert len(set(shape.values())) == 2
    assert shape["0.p"] == shape["1.q"] != shape["0.o"]
    assert len(set(name.values())) == 3
    assert name["0.p"] == name["1.p"] != name["0.q"]
    assert len(set(groups.values())) == 3
    with pytest.raises(TargetError, match=r"'0.q' is in no group"):
        pairs((("p", "o"),))


def test_merge_takes_all_layers():
    """Pitfall: merging has to go over all layers; fold and reset start every layer anew."""
    model, x = two(), torch.randn(3, 6).double()
    bank = rl.attach(model, TiedLoRA(r=2))
    nudge(bank)
    adapted = model(x)
    bank.merge()
    assert torch.allclose(model(x), adapted, atol=1e-12)
    bank.unmerge()
    bank.fold("default")
    bank.reset("default")
    assert torch.allclose(model(x), adapted, atol=1e-12)


def test_saves_shared_factors_once(tmp_path):
    """Interface: the file has A and B once, and the vectors."""
    from safetensors import safe_open

    base, x = Net(p=nn.Linear(6, 5), q=nn.Linear(6, 5)), torch.randn(3, 6)
    model = copy.deepcopy(base)
    nudge(rl.attach(model, TiedLoRA(r=2)))
    rl.save(model, tmp_path / "a")
    with safe_open(next((tmp_path / "a").glob("*.safetensors")), "pt") as file:
        shapes = sorted(tuple(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    assert shapes == [(2,), (2,), (2, 6), (5,), (5,), (5, 2)]
    again = copy.deepcopy(base)
    rl.load(again, tmp_path / "a").use("default")
    assert torch.equal(again(x), model(x))


def test_refusals():
    """Cannot combine: one rank for what is tied; a change that could never move."""
    for train in ((), ("A",), ("A", "u")):
        with pytest.raises(SettingsError, match="B or v has to be trained"):
            TiedLoRA(train=train)
    with pytest.raises(SettingsError, match="'q' asks for r=3, but shares factors of rank 2"):
        rl.attach(two(), TiedLoRA(r=2), rank_pattern={"q": 3})
