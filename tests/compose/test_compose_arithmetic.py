"""A weighted sum of LoRAs as a new LoRA: exact against dense matrices, and against PEFT."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rankloom as rl
from rankloom.compose.arithmetic import combine
from rankloom.errors import NotMergeable, SettingsError, StateError

D, K = 24, 40
X = torch.randn(5, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WEIGHTS = {"a": 0.7, "b": -0.3}


def net():
    torch.manual_seed(3)
    return nn.ModuleDict({"one": nn.Linear(K, D), "two": nn.Linear(K, D), "three": nn.Embedding(K, D)}).double()


def two(method_b=None, targets_b=("one", "two"), targets_a=("one", "two")):
    """Two shaken LoRAs of different scale: a of rank 3, b of rank 5 unless told."""
    model = net()
    bank = rl.attach(model, rl.LoRA(r=3, lora_alpha=6), "a", target_modules=targets_a)
    rl.attach(model, method_b or rl.LoRA(r=5, lora_alpha=2, scaling="rslora"), "b", target_modules=targets_b)
    generator = torch.Generator().manual_seed(7)
    for name in ("a", "b"):
        for _, p, _ in bank.tensors(name):
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model, bank


def wanted(bank, weights=WEIGHTS):
    total = {}
    for name, weight in weights.items():
        for site, change in bank.delta(name).items():
            total[site] = total.get(site, 0) + weight * change
    return total


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("targets", [("one", "two"), ("two", "three")])
def test_side_by_side_is_exact_at_the_sum_of_ranks(targets):
    _, bank = two(targets_b=targets)
    found = combine(bank, WEIGHTS, "new", how="cat")
    for site, change in wanted(bank).items():
        torch.testing.assert_close(bank.delta("new")[site], change, rtol=1e-12, atol=1e-12)
        assert found.ranks[site] == sum(3 if n == "a" else 5 for n in ("a", "b") if site in bank.delta(n))
    assert found.error == 0
    assert bank.active == {"a": 1.0}


@pytest.mark.parametrize("r", [None, 1, 4, 8, 13])
def test_svd_is_the_best_part_of_the_dense_sum(r):
    _, bank = two()
    found = combine(bank, WEIGHTS, "new", r=r)
    rank = 5 if r is None else r
    sizes, losses = [], []
    for site, change in wanted(bank).items():
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        made = bank.delta("new")[site]
        torch.testing.assert_close(made, best, rtol=1e-10, atol=1e-11)
        assert found.errors[site] == pytest.approx(relative(made, change), abs=1e-12)
        assert found.ranks[site] == rank
        sizes.append(float(change.norm()))
        losses.append(float((change - made).norm()))
    total = torch.tensor(losses).norm() / torch.tensor(sizes).norm()
    assert found.error == pytest.approx(float(total), abs=1e-7)
    assert (found.error < 1e-12) == (rank >= 8)


def test_linear_adds_factors_and_states_what_the_cross_terms_cost():
    _, bank = two(rl.LoRA(r=3, lora_alpha=1.5))
    found = combine(bank, WEIGHTS, "new", how="linear")
    a, b, new = ({f.name: f.adapter for f in bank.sites(n)} for n in ("a", "b", "new"))
    for site, change in wanted(bank).items():
        p, q = (0.7 * 2.0) ** 0.5, (0.3 * 0.5) ** 0.5
        torch.testing.assert_close(new[site].A, p * a[site].A - q * b[site].A)
        torch.testing.assert_close(new[site].B, p * a[site].B + q * b[site].B)
        assert new[site].scaling == 1
        assert found.errors[site] == pytest.approx(relative(bank.delta("new")[site], change), rel=1e-9)
        assert found.errors[site] > 0.1
    alone = combine(bank, {"a": -1.5}, "alone", how="linear")
    assert alone.error < 1e-12
    torch.testing.assert_close(bank.delta("alone")["one"], -1.5 * bank.delta("a")["one"])


def test_stacked_parameters():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.weight = nn.Parameter(torch.randn(3, 10, 8, dtype=torch.float64))

    bank = None
    model = Experts()
    for name, r in (("a", 2), ("b", 3)):
        bank = rl.attach(model, rl.LoRA(r=r), name, target_modules=(), target_parameters=["weight"])
        for _, p, _ in bank.tensors(name):
            p.data.normal_()
    for how, r in (("cat", None), ("svd", 5)):
        combine(bank, WEIGHTS, how, how=how, r=r)
        torch.testing.assert_close(bank.delta(how)["weight"], wanted(bank)["weight"])
    found = combine(bank, WEIGHTS, "less", r=2)
    assert found.error == pytest.approx(relative(bank.delta("less")["weight"], wanted(bank)["weight"]), rel=1e-9)


def test_the_new_adapter_is_a_lora_as_any_other(tmp_path):
    model, bank = two()
    combine(bank, WEIGHTS, "new", how="svd", r=6)
    with bank.using("new"):
        out = model["one"](X)
    report = rl.save(model, tmp_path / "new", "new")
    assert (report.format, report.peft_type) == ("peft", "LORA")
    assert report.compat.peft.ok
    again = net()
    rl.load(again, tmp_path / "new")
    torch.testing.assert_close(again["one"](X), out, rtol=1e-6, atol=1e-6)
    with bank.using("new"):
        model["one"](X).sum().backward()
    assert all(p.grad is not None for _, p, _ in bank.tensors("new") if "one" in _)
    bank.merge("new")
    torch.testing.assert_close(model["one"](X), out)


def test_a_union_of_different_sites_travels_too(tmp_path):
    model, bank = two(targets_b=("two", "three"))
    combine(bank, WEIGHTS, "new", how="cat")
    rl.save(model, tmp_path / "new", "new")
    again = rl.load(net(), tmp_path / "new", "new")
    for site, change in bank.delta("new").items():
        torch.testing.assert_close(again.delta("new")[site], change)


@pytest.mark.parametrize("how", ["svd", "cat", "linear"])
def test_the_peer_gets_the_same_matrices(how):
    from peft import LoraConfig, get_peft_model

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(K, D), nn.Linear(D, D)

        def forward(self, x):
            return self.two(self.one(x))

    torch.manual_seed(0)
    base = Two()
    rank_b = 3 if how == "linear" else 5
    ours = copy.deepcopy(base)
    theirs = get_peft_model(base, LoraConfig(r=3, lora_alpha=6, target_modules=["one", "two"]), "a")
    theirs.add_adapter("b", LoraConfig(r=rank_b, lora_alpha=2, use_rslora=True, target_modules=["one", "two"]))
    bank = rl.attach(ours, rl.LoRA(r=3, lora_alpha=6), "a", target_modules=["one", "two"])
    rl.attach(ours, rl.LoRA(r=rank_b, lora_alpha=2, scaling="rslora"), "b", target_modules=["one", "two"])
    peers = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    for name in ("a", "b"):
        for site in bank.sites(name):
            peer = peers[site.name]
            for mine, other in ((site.adapter.A, peer.lora_A[name]), (site.adapter.B, peer.lora_B[name])):
                mine.data.normal_()
                other.weight.data.copy_(mine.data)
    theirs.add_weighted_adapter(["a", "b"], [0.7, -0.3], "new", combination_type=how)
    found = combine(bank, WEIGHTS, "new", how=how)
    for site, change in bank.delta("new").items():
        peer = peers[site].get_delta_weight("new")
        torch.testing.assert_close(change, peer, rtol=1e-4, atol=1e-5)
        assert found.ranks[site] == peers[site].lora_A["new"].weight.shape[0]


class Largest(TorchDispatchMode):
    """The most elements that any tensor computed inside the block had, and how often QR and SVD ran."""

    def __init__(self):
        super().__init__()
        self.elements, self.calls = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return out


@pytest.mark.parametrize("how", ["svd", "cat", "linear"])
def test_no_matrix_of_the_layer_is_ever_built(how):
    model = nn.Sequential(nn.Linear(600, 500))
    bank = None
    for name in ("a", "b"):
        bank = rl.attach(model, rl.LoRA(r=2), name, target_modules=["0"])
    with Largest() as seen:
        combine(bank, WEIGHTS, "new", how=how)
    assert 600 * 2 <= seen.elements <= 600 * 8
    assert seen.elements < 500 * 600 / 50


def test_layers_of_one_shape_are_computed_together():
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(9)))
    bank = None
    for name in ("a", "b"):
        bank = rl.attach(model, rl.LoRA(r=2), name, target_modules="all-linear")
    with Largest() as seen:
        combine(bank, WEIGHTS, "new")
    assert (seen.calls["linalg_qr"], seen.calls["_linalg_svd"]) == (2, 1)


def test_what_cannot_be_combined_is_refused_and_nothing_is_attached():
    model, bank = two()
    rl.attach(model, rl.DoRA(rl.LoRA(r=2)), "dora", target_modules=["one"])
    rl.attach(model, rl.LoRA(r=2, lora_bias=True), "bias", target_modules=["one"])
    rl.attach(model, rl.LoRA(r=2), "saved", target_modules=["one"], modules_to_save=["two"])
    names = bank.names
    for other, kind in (("dora", "DoRAAdapter"), ("bias", "LoRAAdapter"), ("saved", "WholeAdapter")):
        with pytest.raises(NotMergeable, match=rf"adapter '{other}' at .* is {kind}, no plain factor pair"):
            combine(bank, {"a": 1.0, other: 0.5}, "new", how="cat")
    cases = [
        ({}, {}, "name the adapters"),
        ({"a": float("nan")}, {}, "a weight is a finite number"),
        ({"a": True}, {}, "a weight is a finite number"),
        ({"a": 1.0}, {"how": "svt"}, "did you mean 'svd'"),
        ({"a": 1.0}, {"how": "cat", "r": 4}, "belongs to how='svd'"),
        ({"a": 1.0}, {"r": 0}, "from 1 to 65,536"),
        ({"a": 1.0, "b": 1.0}, {"how": "linear"}, r"of one rank, not of \[3, 5\]"),
    ]
    for weights, settings, message in cases:
        with pytest.raises(SettingsError, match=message):
            combine(bank, weights, "new", **settings)
    with pytest.raises(StateError, match="no adapter 'c'"):
        combine(bank, {"c": 1.0}, "new")
    with pytest.raises(StateError, match="there is an adapter 'b' already"):
        combine(bank, {"a": 1.0}, "b")
    assert bank.names == names
