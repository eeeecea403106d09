"""Mixtures: n stacked experts of any method are a loop of n, whatever weighs them; sparse is dense with zeros."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import rankloom as rl
from rankloom.core.gate import Gate, Router
from rankloom.core.notes import Notes
from rankloom.errors import NotMergeable, SettingsError, StateError, TargetError
from rankloom.gates.constant import Constant
from rankloom.gates.linear import Linear
from rankloom.gates.task import Task
from rankloom.gates.topk import TopK
from rankloom.ops.dispatch import dispatched

N = 3


@dataclass(frozen=True)
class Given(Gate):
    """Weights that a test hands over in the context."""

    fixed: bool = False

    @property
    def constant(self) -> bool:
        return self.fixed

    def build(self, site, n):
        return GivenRouter(site, n)


class GivenRouter(Router):
    def forward(self, x, base):
        return self.column(base, "weights", x)


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def net(layer=None) -> Net:
    torch.manual_seed(0)
    return Net(layer or nn.Linear(6, 5)).double().eval()


def nudge(bank, name="default"):
    torch.manual_seed(1)
    with torch.no_grad():
        for _, p, _ in bank.trainable(name):
            p.add_(torch.randn_like(p) * 0.3)


def adapter(bank, name="default"):
    return bank.sites(name)[0].adapter


INNER = {
    "lora": rl.LoRA(r=2),
    "lora+bias": rl.LoRA(r=2, lora_bias=True),
    "pissa": rl.LoRA(r=2, init_lora_weights="pissa"),
    "asymmetric": rl.AsymmetricLoRA(r=2),
    "adalora": rl.AdaLoRA(init_r=3, target_r=2),
    "dylora": rl.DyLoRA(r=3),
    "vera": rl.VeRA(r=4),
    "qa_lora": rl.QALoRA(r=2, group_size=3),
    "dora": rl.DoRA(rl.LoRA(r=2)),
    "dora+norm": rl.DoRA(rl.LoRA(r=2), detach_norm=False),
    "dora+column": rl.DoRA(rl.LoRA(r=2), norm_axis="column"),
    "dora(vera)": rl.DoRA(rl.VeRA(r=4)),
    "slices": rl.Slices(rl.LoRA(r=2), parts=5, on=(0, 3)),
}


def loop(model, bank, inner, x, weights, **plan):
    """The sum over single experts, each an adapter of its own on the bare base, weights (…, n)."""
    experts = adapter(bank).experts
    total = 0
    for i in range(N):
        one = copy.deepcopy(net(copy.deepcopy(model.base)))
        own = rl.attach(one, inner, **plan)
        state = experts.state_dict()
        adapter(own).load_state_dict(
            {k: v[i] if v.ndim > adapter(own).state_dict()[k].ndim else v for k, v in state.items()}
        )
        for key, p in own.shared_of("default").named_parameters():
            p.data.copy_(bank.shared_of("default").get_parameter(key))
        with own.using():
            y = one(x)
        total = total + weights[..., i, None] * (one(x) - y)
    return y + total


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("by", ["token", "row", "all"])
def test_stacked_equals_a_loop_of_n(name, by):
    model = net()
    model.base = copy.deepcopy(model.fc)
    bank = rl.attach(model, rl.Mixture(INNER[name], N, Given(by != "token")), target_modules=["fc"])
    nudge(bank)
    x = torch.randn(2, 4, 6).double()
    weights = torch.rand({"token": (2, 4, N), "row": (2, N), "all": (N,)}[by])
    with bank.using("default", context={"weights": weights}):
        found = model(x)
    spread = {"token": weights, "row": weights[:, None], "all": weights}[by].double()
    wanted = loop(model, bank, INNER[name], x, spread, target_modules=["fc"])
    assert torch.allclose(found, wanted, atol=1e-9), (found - wanted).abs().max()
    if by == "all":
        delta = bank.delta("default", {"weights": weights})["fc"]
        assert delta.shape == (5, 6)
        bank.merge("default", context={"weights": weights})
        assert torch.allclose(model(x), wanted, atol=1e-9)


@pytest.mark.parametrize("inner", [rl.LoRA(r=2), rl.DoRA(rl.LoRA(r=2))], ids=["lora", "dora"])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), torch.randn(2, 4, 5, 5).double()),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.randn(2, 4, 5, 5).double()),
        (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 7).double()),
        (nn.Embedding(9, 6), torch.randint(9, (2, 5))),
    ],
    ids=["conv2d", "groups", "conv1d", "embedding"],
)
def test_other_kinds_by_row_equal_the_rows_apart(layer, x, inner):
    model = net(copy.deepcopy(layer))
    bank = rl.attach(model, rl.Mixture(inner, N, Given(True)), target_modules=["fc"])
    nudge(bank)
    weights = torch.rand(2, N)
    with bank.using("default", context={"weights": weights}):
        found = model(x)
    for row in range(2):
        with bank.using("default", context={"weights": weights[row]}):
            assert torch.allclose(found[row], model(x)[row], atol=1e-10)
            assert not torch.allclose(found[row], model(x)[1 - row], atol=1e-3)
    bank.merge("default", context={"weights": weights[1]})
    assert torch.allclose(model(x)[1], found[1], atol=1e-10)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 5, 6).double())

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.weight)


@pytest.mark.parametrize("inner", [rl.LoRA(r=2), rl.AdaLoRA(init_r=2, target_r=1), rl.DoRA(rl.LoRA(r=2))])
def test_bare_stacked_parameters_mix_with_constant_weights(inner):
    model = net(Experts())
    plan = {"target_modules": [], "target_parameters": ["fc.weight"]}
    bank = rl.attach(model, rl.Mixture(inner, N, Constant((0.5, 0.2, 1.0))), **plan)
    nudge(bank)
    x = torch.randn(3, 6).double()
    found = model(x)
    each = adapter(bank).experts.delta(bank.sites("default")[0].base)
    assert each.shape == (N, 2, 5, 6)
    change = 0.5 * each[0] + 0.2 * each[1] + each[2]
    with bank.using():
        assert torch.allclose(found - model(x), torch.einsum("bi,eoi->beo", x, change), atol=1e-7)
    bank.merge()
    assert torch.allclose(model(x), found, atol=1e-10)
    with pytest.raises(TargetError, match="bare parameter"):
        rl.attach(net(Experts()), rl.Mixture(inner, N), **plan)


@pytest.mark.parametrize("weights", ["kept", "renormalised", "one"])
@pytest.mark.parametrize(
    "inner", [rl.LoRA(r=2, lora_bias=True), rl.AdaLoRA(init_r=2, target_r=1), rl.DoRA(rl.LoRA(r=2))]
)
@pytest.mark.parametrize("share", [False, True])
def test_sparse_equals_the_masked_dense_form(weights, inner, share):
    model = net()
    method = rl.Mixture(inner, 4, TopK(2, weights), share=("A",) if share else ())
    bank = rl.attach(model, method, target_modules=["fc"])
    nudge(bank)
    x = torch.randn(2, 7, 6).double()

    def answer(top):
        adapter(bank).gate.top = top
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        return y, [p.grad for _, p, _ in bank.trainable()]

    sparse, dense = answer(2), answer(None)
    assert torch.allclose(sparse[0], dense[0], atol=1e-12)
    for (key, _, _), one, two in zip(bank.trainable(), sparse[1], dense[1]):
        assert (one is None) == (two is None) == (weights == "one" and "gate" in key), key
        assert one is None or torch.allclose(one, two, atol=1e-6), key


def test_dispatch_computes_no_more_than_what_was_chosen():
    """Rows that pass through experts: k for each token, in at most n products each way."""
    from torch.utils.flop_counter import FlopCounterMode

    t, n, k, r, i, o = 32, 8, 2, 4, 16, 12
    x, a, b = torch.randn(t, i), torch.randn(n, r, i), torch.randn(n, o, r)
    weights = torch.zeros(t, n).scatter(1, torch.rand(t, n).topk(k).indices, torch.rand(t, k))
    with FlopCounterMode(display=False) as flops:
        found = dispatched(x, weights, k, a, b)
    assert flops.get_total_flops() == 2 * t * k * r * (i + o)
    assert torch.allclose(found, torch.einsum("tn,nor,nri,ti->to", weights, b, a, x), atol=1e-4)


def test_topk_has_weights_by_their_names_and_notes_what_it_chose():
    for kind in ("kept", "renormalised", "one"):
        model = net()
        bank = rl.attach(model, rl.Mixture(rl.LoRA(r=1), 4, TopK(2, kind)), target_modules=["fc"])
        bank.selector.notes = notes = Notes(("router", "experts"))
        x = torch.randn(3, 6).double()
        weights = adapter(bank).weights(x, bank.sites("default")[0].base)
        model(x)
        soft, chosen = notes["router"]["fc"], notes["experts"]["fc"]
        assert soft.dtype == torch.float32
        assert torch.equal(chosen, soft.topk(2).indices)
        assert (weights > 0).sum(-1).tolist() == [2, 2, 2]
        top = soft.gather(-1, chosen)
        wanted = {"kept": top, "renormalised": top / top.sum(-1, keepdim=True), "one": torch.ones(3, 2)}[kind]
        assert torch.allclose(weights.gather(-1, chosen), wanted)


def test_no_notes_are_kept_when_nobody_reads():
    model = net()
    bank = rl.attach(model, rl.molora(n=2), target_modules=["fc"])
    bank.selector.notes = notes = Notes(())
    model(torch.randn(3, 6).double())
    assert not notes["router"]


def test_each_block_may_have_its_own_number_of_experts():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    bank = rl.attach(model, rl.molora(n=(1, 2, 4), r=2))
    assert [site.adapter.experts.A.shape[0] for site in bank.sites("default")] == [1, 2, 4]
    assert [site.adapter.gate.scores.weight.shape for site in bank.sites("default")] == [(1, 6), (2, 6), (4, 6)]
    with pytest.raises(SettingsError, match=r"block 2"):
        rl.attach(nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))), rl.molora(n=(1, 2)))
    with pytest.raises(SettingsError, match="outside of any block"):
        rl.attach(net(), rl.molora(n=(1, 2)), target_modules=["fc"])
    with pytest.raises(SettingsError, match=r"n=\(2, 0\)"):
        rl.molora(n=(2, 0))


def test_ranks_and_scales_vary_from_site_to_site():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(2)))
    bank = rl.attach(model, rl.molora(n=2, r=2), rank_pattern={"1": 3}, alpha_pattern={"0": 4.0})
    one, two = (site.adapter.experts for site in bank.sites("default"))
    assert (one.A.shape, two.A.shape) == ((2, 2, 6), (2, 3, 6))
    assert (one.scaling, two.scaling) == (2.0, 16 / 3)


def test_shared_tensors_have_no_first_dim_and_are_refused_by_name():
    bank = rl.attach(net(), rl.Mixture(rl.LoRA(r=2), 3, share=("B",)), target_modules=["fc"])
    assert {k: tuple(p.shape) for k, p in adapter(bank).experts.named_parameters()} == {"A": (3, 2, 6), "B": (5, 2)}
    with pytest.raises(SettingsError, match="no tensor 'Q'"):
        rl.attach(net(), rl.Mixture(rl.LoRA(r=2), 3, share=("Q",)), target_modules=["fc"])


def test_what_does_not_stack_is_refused_by_name():
    with pytest.raises(TargetError, match="do not nest"):
        rl.attach(net(), rl.Mixture(rl.molora(), 2), target_modules=["fc"])
    conv = net(nn.Conv2d(3, 3, 3))
    with pytest.raises(TargetError, match=r"mixture.*'fc' is a conv2d"):
        rl.attach(conv, rl.molora(), target_modules=["fc"])
    with pytest.raises(TargetError, match="unrolled_lora.*'fc'"):
        rl.attach(conv, rl.Mixture(rl.UnrolledLoRA(r=1), 2, Constant()), target_modules=["fc"])
    assert not hasattr(conv, "rankloom")


def test_a_column_that_is_missing_is_named_with_what_hands_it_on():
    model = net()
    bank = rl.attach(model, rl.Mixture(rl.LoRA(r=2), 2, Task(3, 4)), target_modules=["fc"])
    x = torch.randn(4, 6).double()
    with pytest.raises(StateError, match=r"column 'task'.*fit\(context=\('task',\)\).*bank.using"):
        model(x)
    with pytest.raises(NotMergeable, match=r"'fc' needs to know 'task'"):
        bank.merge()
    with pytest.raises(NotMergeable, match="for each row"):
        bank.merge(context={"task": torch.tensor([0, 1])})
    for bad in (3, -1, torch.tensor([0, 5, 1, 1])):
        with pytest.raises(StateError, match="knows 0 to 2"), bank.using("default", context={"task": bad}):
            model(x)
    three = bank.using("default", context={"task": torch.tensor([0, 1, 1])})
    with pytest.raises(StateError, match="3 batch rows, the layer sees 4"), three:
        model(x)
    assert torch.equal(model.fc.weight, net().fc.weight)


def test_rows_that_select_an_adapter_see_their_own_part_of_the_context():
    model = net()
    bank = rl.attach(model, rl.Mixture(rl.LoRA(r=2), 2, Task(3, 4)), "a", target_modules=["fc"])
    rl.attach(model, rl.LoRA(r=2), "b", target_modules=["fc"])
    nudge(bank, "a")
    x, task = torch.randn(4, 2, 6).double(), torch.tensor([0, 1, 2, 1])
    with bank.using("a", context={"task": task}):
        alone = model(x)
    with bank.using(rows=["b", "a", None, "a"], context={"task": task}):
        found = model(x)
    assert torch.allclose(found[[1, 3]], alone[[1, 3]], atol=1e-12)
    assert not torch.allclose(found[0], alone[0], atol=1e-4)


def test_beams_repeat_the_context_of_their_row():
    model = net()
    bank = rl.attach(model, rl.Mixture(rl.LoRA(r=2), 2, Task(3, 4)), target_modules=["fc"])
    nudge(bank)
    x = torch.randn(2, 3, 6).double()
    with bank.using("default", context={"task": torch.tensor([2, 0])}):
        assert torch.allclose(model(x.repeat_interleave(3, 0))[::3], model(x), atol=1e-12)


def test_router_parameters_have_the_role_router_owned_or_shared():
    for gate in (Linear(bias=True), Task(2, 4), Task(2, 4, share=True), TopK(1)):
        bank = rl.attach(net(), rl.Mixture(rl.LoRA(r=2), 3, gate), target_modules=["fc"])
        roles = {key.rpartition(":")[2]: role for key, _, role in bank.tensors("default")}
        assert {role for key, role in roles.items() if "experts" not in key} == {"router"}, roles
        assert roles["experts.A"] == "in"
        assert roles["experts.B"] == "out"


def test_a_mixture_inside_dora_turns_rows_where_it_has_a_matrix():
    model = net()
    bank = rl.attach(model, rl.DoRA(rl.Mixture(rl.LoRA(r=2), 2, Constant())), target_modules=["fc"])
    nudge(bank)
    x = torch.randn(4, 6).double()
    found = model(x)
    bank.merge()
    assert torch.allclose(model(x), found, atol=1e-10)
    with pytest.raises(NotMergeable, match="depends on its input"):
        rl.attach(net(), rl.DoRA(rl.Mixture()), target_modules=["fc"])


def test_gate_settings_are_checked():
    for make, words in (
        (lambda: TopK(0), "k=0"),
        (lambda: Linear(temperature=0), "temperature=0"),
        (lambda: Task(0), "tasks=0"),
        (lambda: rl.moelora_task(r=6, n=4), "n=4 must divide it"),
    ):
        with pytest.raises(SettingsError, match=words):
            make()
    with pytest.raises(SettingsError, match="2 experts"):
        rl.attach(net(), rl.Mixture(rl.LoRA(r=2), 2, Constant((1.0, 2.0, 3.0))), target_modules=["fc"])
