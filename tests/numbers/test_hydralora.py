"""HydraLoRA (arXiv 2404.19245): one A, several B, a router for each token; and how many B from data."""

from __future__ import annotations

import pytest
import torch
from number_tools import count, linear, nudge, only
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rankloom as rl
from rankloom.errors import NotMergeable, SettingsError, TargetError
from rankloom.ops.cluster import count_clusters, kmeans


def _spoken(r=3, n_b=4, seed=0, **settings):
    torch.manual_seed(seed)
    model = linear(7, 6)
    bank = rl.attach(model, rl.hydralora(r=r, n_b=n_b, lora_alpha=2 * r, **settings))
    nudge(bank)
    return model, bank, only(bank)


def test_identity_and_count():
    """Must hold (1, 2): identity at start; r·d_in + N·r·d_out + N·d_in numbers."""
    model, x = linear(7, 6), torch.randn(3, 4, 7).double()
    before = model(x)
    bank = rl.attach(model, rl.hydralora(r=3, n_b=4))
    assert torch.equal(model(x), before)
    assert count(bank) == 3 * 7 + 4 * 3 * 6 + 4 * 7


def test_equation_by_hand():
    """Mechanism: y = W x + s Σ softmax(R x)_i B_i A x, with weights 1/4 and 3/4."""
    model = linear(1, 1, bias=False)
    adapter = only(rl.attach(model, rl.hydralora(r=1, n_b=2, lora_alpha=5)))
    with torch.no_grad():
        model.fc.weight.fill_(1.0)
        adapter.experts.A.fill_(2.0)
        adapter.experts.B.copy_(torch.tensor([[[4.0]], [[8.0]]]))
        adapter.gate.scores.weight.copy_(torch.tensor([[0.0], [torch.log(torch.tensor(3.0))]]))
    y = model(torch.ones(1, 1).double())
    assert y.item() == pytest.approx(1 + 5 * (0.25 * 4 + 0.75 * 8) * 2, rel=1e-6)


def test_against_the_sum_over_heads():
    """Mechanism: the batched form equals the sum over heads, on (batch, token, feature) inputs."""
    model, bank, a = _spoken()
    x = torch.randn(2, 5, 7).double()
    weights = torch.softmax((x @ a.gate.scores.weight.T).float(), -1).double()
    want = sum(2.0 * weights[..., i, None] * (x @ a.experts.A.T @ a.experts.B[i].T) for i in range(4))
    with bank.using():
        base = model(x)
    assert torch.allclose(model(x) - base, want, atol=1e-7)


def test_one_head_is_lora():
    """Must hold (3): N = 1 is LoRA."""
    model, bank, a = _spoken(n_b=1)
    x = torch.randn(4, 7).double()
    with bank.using():
        base = model(x)
    assert torch.allclose(model(x) - base, 2.0 * x @ a.experts.A.T @ a.experts.B[0].T, atol=1e-12)


def test_equal_heads_are_lora():
    """Must hold (4): equal B are LoRA for any router."""
    model, bank, a = _spoken()
    x = torch.randn(4, 7).double()
    with torch.no_grad():
        a.experts.B.copy_(a.experts.B[:1].expand_as(a.experts.B).clone())
    with bank.using():
        base = model(x)
    assert torch.allclose(model(x) - base, 2.0 * x @ a.experts.A.T @ a.experts.B[0].T, atol=1e-6)


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n_b", [1, 2, 8])
def test_products_do_not_grow_with_heads(n_b):
    """Must hold (5): A x once: base, A, router and all heads together are four products, for any number of heads."""
    model, _, _ = _spoken(n_b=n_b)
    x = torch.randn(4, 7).double()
    with _Products() as products:
        model(x)
    assert products.n == 4


def _planted(k: int, seed: int, d: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = 8 * torch.linalg.qr(torch.randn(d, d, generator=generator))[0][:k]
    return (centres[:, None] + torch.randn(k, 20, d, generator=generator)).flatten(0, 1)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_number_of_heads_from_data(k):
    """Must hold (6): planted K clusters give n_b = K."""
    for seed in range(2):
        assert rl.hydralora(n_b=count_clusters(_planted(k, seed))).n == k


def test_kmeans_recovers_the_partition():
    """Clusters: planted labels up to renaming, centres at the means, inertia by hand, the same on every call."""
    x = _planted(4, 3)
    found = kmeans(x, 4, seed=1)
    groups = found.labels.reshape(4, 20)
    assert (groups == groups[:, :1]).all()
    assert len(set(groups[:, 0].tolist())) == 4
    means = x.reshape(4, 20, 16).mean(1)
    assert torch.allclose(found.centres[groups[:, 0]], means, atol=1e-5)
    assert found.inertia == pytest.approx((x.reshape(4, 20, 16) - means[:, None]).square().sum().item(), rel=1e-5)
    assert torch.equal(kmeans(x, 4, seed=1).labels, found.labels)


def test_kmeans_edges():
    """Clusters: as many as points is exact; repeated points and one cluster are fine; impossible k is refused."""
    x = torch.tensor([[0.0], [1.0], [5.0]])
    assert kmeans(x, 3).inertia == 0
    assert kmeans(torch.ones(5, 2), 2).inertia == 0
    assert kmeans(x, 1).centres.item() == pytest.approx(2.0)
    assert count_clusters(torch.tensor([[0.0, 0], [9, 9]]).repeat_interleave(10, 0)) == 2
    for bad in (0, 4):
        with pytest.raises(SettingsError, match=f"k={bad}"):
            kmeans(x, bad)
    with pytest.raises(SettingsError):
        count_clusters(torch.ones(1, 2))


def test_spaces_of_the_change():
    """Must hold (7): the change of any token lies in the span of the B's; for a fixed gate it is a matrix of rank ≤ r whose
    rows lie in the row space of A."""
    model, bank, a = _spoken(r=1, n_b=3)
    x = torch.randn(40, 7).double()
    with bank.using():
        base = model(x)
    change = model(x) - base
    span = torch.linalg.qr(a.experts.B.transpose(0, 1).flatten(1))[0]
    assert torch.allclose(change @ span @ span.T, change, atol=1e-10)
    assert torch.linalg.matrix_rank(change, tol=1e-8) == 3
    with torch.no_grad():
        a.gate.scores.weight.zero_()
    eye = torch.eye(7).double()
    with bank.using():
        silent = model(eye)
    matrix = (model(eye) - silent).T
    assert torch.linalg.matrix_rank(matrix, tol=1e-8) == 1
    rows = torch.linalg.qr(a.experts.A.T)[0]
    assert torch.allclose(matrix @ rows @ rows.T, matrix, atol=1e-10)


def test_random_router_breaks_the_tie():
    """Pitfall: from B = 0 equal gates would keep the heads equal for ever; the random router parts them at the first step."""
    for router, apart in ((None, True), (0.0, False)):
        torch.manual_seed(0)
        model = linear(7, 6)
        a = only(rl.attach(model, rl.hydralora(r=2, n_b=3)))
        if router is not None:
            nn.init.constant_(a.gate.scores.weight, router)
        x = torch.randn(5, 7).double()
        (model(x) - torch.randn(5, 6).double()).square().sum().backward()
        assert (a.experts.B.grad[0] - a.experts.B.grad[1]).abs().max().item() > (1e-3 if apart else -1)
        assert torch.allclose(a.experts.B.grad[0], a.experts.B.grad[1]) != apart


def test_top1_in_eval():
    """Interface: infer="top1" takes the strongest head alone in eval mode, and mixes in training."""
    model, bank, a = _spoken(infer="top1")
    x = torch.randn(6, 7).double()
    best = (x @ a.gate.scores.weight.T).argmax(-1)
    with bank.using():
        base = model(x)
    want = torch.stack([2.0 * a.experts.B[i] @ a.experts.A @ row for i, row in zip(best, x)])
    assert torch.allclose(model.eval()(x) - base, want, atol=1e-10)
    assert not torch.allclose(model.train()(x) - base, want, atol=1e-3)


def test_router_sees_the_whole_input():
    """Mechanism: dropout is on the way to A only; the gates stay what they are."""
    model = linear(1, 1, bias=False)
    a = only(rl.attach(model, rl.hydralora(r=1, n_b=2, lora_alpha=1, lora_dropout=0.5)))
    with torch.no_grad():
        model.fc.weight.zero_()
        a.experts.A.fill_(1.0)
        a.experts.B.copy_(torch.tensor([[[0.0]], [[1.0]]]))
        a.gate.scores.weight.copy_(torch.tensor([[0.0], [1.0]]))
    gate = torch.sigmoid(torch.tensor(1.0)).item()
    found = sorted({round(model(torch.ones(1, 1).double()).item(), 5) for _ in range(40)})
    assert found == [0.0, pytest.approx(2 * gate, abs=1e-5)]


def test_not_mergeable_and_refusals():
    """Interface: not mergeable; linear layers only; at least one head."""
    model, bank, _ = _spoken()
    weight = model.fc.weight.detach().clone()
    with pytest.raises(NotMergeable):
        bank.merge("default")
    assert torch.equal(model.fc.weight, weight)
    with pytest.raises(TargetError, match="conv2d"):
        rl.attach(nn.Sequential(nn.Conv2d(2, 2, 1)), rl.hydralora(), target_modules=["0"])
    with pytest.raises(SettingsError, match="n=0"):
        rl.hydralora(n_b=0)
