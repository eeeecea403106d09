"""MoLoRA (arXiv 2309.05444): LoRA experts mixed by a softmax of the layer's input."""

from __future__ import annotations

import pytest
import torch
from number_tools import count, linear, nudge, only
from torch.utils._python_dispatch import TorchDispatchMode

import rankloom as rl
from rankloom.errors import NotMergeable


def _moved(n=4, r=3, **settings):
    torch.manual_seed(0)
    model = linear(7, 6)
    bank = rl.attach(model, rl.molora(n=n, r=r, lora_alpha=2.0 * r, **settings))
    nudge(bank)
    return model, bank, only(bank)


def change(model, bank, x):
    with bank.using():
        base = model(x)
    return model(x) - base


def test_identity_and_count():
    """Must hold (1, 6): identity at start; n·r(d_in + d_out) + n·d_in numbers; R ~ N(0, 0.02²)."""
    torch.manual_seed(0)
    model, x = linear(300, 40), torch.randn(3, 300).double()
    before = model(x)
    bank = rl.attach(model, rl.molora(n=5, r=3))
    assert torch.equal(model(x), before)
    assert count(bank) == 5 * 3 * (300 + 40) + 5 * 300
    assert only(bank).gate.scores.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_one_expert_is_lora():
    """Must hold (2)."""
    model, bank, a = _moved(n=1)
    x = torch.randn(4, 7).double()
    assert torch.allclose(change(model, bank, x), 2 * x @ a.experts.A[0].T @ a.experts.B[0].T, atol=1e-12)


def test_identical_experts_are_one_lora_for_any_router():
    """Must hold (3)."""
    model, bank, a = _moved()
    with torch.no_grad():
        a.experts.A.copy_(a.experts.A[:1].expand_as(a.experts.A).clone())
        a.experts.B.copy_(a.experts.B[:1].expand_as(a.experts.B).clone())
    x = torch.randn(4, 7).double()
    assert torch.allclose(change(model, bank, x), 2 * x @ a.experts.A[0].T @ a.experts.B[0].T, atol=1e-6)


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", [1, 4, 9])
def test_dense_is_one_lora_of_rank_nr_with_a_gated_middle(n):
    """Must hold (4), and the mechanism by hand: outputs are mixed, Σ g_i B_i A_i x; router, A and B are three products."""
    model, bank, a = _moved(n=n)
    x = torch.randn(2, 5, 7).double()
    g = torch.softmax(x.float() @ a.gate.scores.weight.float().T, -1).double()
    wanted = 2 * torch.einsum("btn,nor,nri,bti->bto", g, a.experts.B, a.experts.A, x)
    assert torch.allclose(change(model, bank, x), wanted, atol=1e-7)
    thin = a.thin(bank.sites("default")[0].base, x)
    assert thin.A.shape == (n * 3, 7)
    assert thin.B.shape == (6, n * 3)
    assert thin.inner.shape == (2, 5, n * 3)
    with torch.no_grad(), _Products() as products:
        model(x)
    assert products.n == 4  # the layer's own among them


def test_a_router_of_zeros_merges():
    """Must hold (5): R = 0 gives ΔW = s/n Σ B_i A_i; any other router is refused by name, and nothing is touched."""
    model, bank, a = _moved()
    weight = model.fc.weight.detach().clone()
    with pytest.raises(NotMergeable, match=r"LinearRouter at 'fc' depends on its input"):
        bank.merge()
    assert torch.equal(model.fc.weight, weight)
    with torch.no_grad():
        a.gate.scores.weight.zero_()
    x = torch.randn(4, 7).double()
    said = model(x)
    bank.merge()
    assert torch.allclose(model(x), said, atol=1e-6)
    wanted = 2 / 4 * torch.einsum("nor,nri->oi", a.experts.B, a.experts.A)
    assert torch.allclose(model.fc.weight - weight, wanted, atol=1e-6)


def test_topk_takes_the_largest_as_they_are():
    """Interface: top_k without renormalising; k = n is dense."""
    model, bank, a = _moved(top_k=2)
    x = torch.randn(6, 7).double()
    g = torch.softmax(x.float() @ a.gate.inner.scores.weight.float().T, -1).double()
    g = g * (g >= g.topk(2).values[:, -1:])
    wanted = 2 * torch.einsum("tn,nor,nri,ti->to", g, a.experts.B, a.experts.A, x)
    assert torch.allclose(change(model, bank, x), wanted, atol=1e-7)
    full = _moved(top_k=4)
    dense = _moved()
    full[2].gate.inner.load_state_dict(dense[2].gate.state_dict())
    full[2].experts.load_state_dict(dense[2].experts.state_dict())
    assert torch.allclose(full[0](x), dense[0](x), atol=1e-12)


def test_it_learns_what_one_lora_of_an_experts_rank_cannot():
    """Two kinds of tokens that need opposite changes: a mixture parts them, one LoRA, even of rank 2r, cannot."""
    torch.manual_seed(0)
    kind = torch.randint(2, (64, 1)).double()
    x = torch.cat([torch.randn(64, 5).double(), 4 * kind - 2, torch.ones(64, 1).double()], -1)
    plant = torch.randn(6, 7).double()
    losses = {}
    for name, method in {"mixture": rl.molora(n=2, r=2), "lora": rl.LoRA(r=4, lora_alpha=16)}.items():
        torch.manual_seed(1)
        model = linear(7, 6)
        bank = rl.attach(model, method)
        with torch.no_grad(), bank.using():
            wanted = model(x) + (2 * kind - 1) * (x[:, :5] @ plant[:, :5].T)
            losses["base"] = (wanted - model(x)).square().mean().item()
        optimizer = torch.optim.Adam([p for _, p, _ in bank.trainable()], lr=2e-2)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (model(x) - wanted).square().mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["mixture"] < 0.3 * losses["lora"], losses
    assert losses["mixture"] < 0.3 * losses["base"], losses
