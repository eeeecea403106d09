"""LLaVA-MoLE (arXiv 2401.16160): each token through one LoRA expert, chosen once for an MLP."""

from __future__ import annotations

import pytest
import torch
from gate_tools import SEVEN, D, penalty, shake, tower
from torch.utils.flop_counter import FlopCounterMode

import rankloom as rl
from rankloom.core.notes import Notes
from rankloom.errors import StateError, TargetError
from rankloom.rules.balance import SequenceBalance

MLP = SEVEN[4:]


def _moved(n=3, **settings):
    model = tower()
    plan = rl.llava_mole(n=n, r=2, lora_alpha=4.0, lora_dropout=0.0, **settings)
    bank = rl.attach(model, plan, target_modules=MLP)
    shake(bank, "default", 1)
    return model, bank


X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(5)).double()


def test_identity_and_one_router_for_an_mlp():
    """Must hold (1); mechanism: one linear router with bias on the MLP's input, shared by its projections."""
    model = tower()
    before = model(X)
    bank = rl.attach(model, rl.llava_mole(r=2, lora_dropout=0.0), target_modules=MLP)
    assert torch.allclose(model(X), before, atol=0)
    routers = {k: tuple(p.shape) for k, p, role in bank.tensors("default") if role == "router"}
    assert sorted(routers.values()) == sorted([(3, D), (3,)] * 2)
    assert all(key.startswith("shared:") for key in routers)


def test_by_hand_and_the_router_reads_the_input_of_the_mlp():
    """Mechanism: Δ = s·B_i* A_i* x, i* = argmax of the router on the MLP's input, for down_proj too, ungated."""
    model, bank = _moved()
    mlp = model.layers[0].mlp
    seen = {}
    hooks = [
        m.register_forward_hook(lambda m, args, out, n=n: seen.update({n: (args[0], out)}))
        for n, m in {"mlp": mlp, "down": mlp.down_proj}.items()
    ]
    model(X)
    for hook in hooks:
        hook.remove()
    site = next(s for s in bank.sites("default") if s.name == "layers.0.mlp.down_proj")
    scores = site.adapter.gate.inner.scores
    chosen = (seen["mlp"][0].float() @ scores.weight.float().T + scores.bias.float()).argmax(-1)
    x, out = seen["down"]
    a, b = site.adapter.experts.A[chosen], site.adapter.experts.B[chosen]
    wanted = x @ mlp.down_proj.weight.T + 2 * torch.einsum("btor,btri,bti->bto", b, a, x)
    assert torch.allclose(out, wanted, atol=1e-10)


def test_only_the_balance_moves_an_ungated_router():
    """Must hold (2): the task's loss has no gradient on the router; gated it has; the balance loss always has."""
    for gated in (False, True):
        model, bank = _moved(gate_output=gated)
        routers = [p for _, p, role in bank.tensors("default") if role == "router"]
        model(X).square().sum().backward()
        assert all((p.grad is None) != gated for p in routers)
        for p in routers:
            p.grad = None
        penalty(bank, SequenceBalance(), {}, lambda model=model: model(X)).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in routers)


def _balance(soft, mask=None):
    run = type("Run", (), {"notes": Notes(("router",)), "batch": {} if mask is None else {"attention_mask": mask}})
    for site, value in soft.items():
        run.notes.put("router", site, value)
    return SequenceBalance(1.0).loss(run, torch.zeros(())).item()


def test_balance_is_one_over_n_when_even_and_one_at_collapse():
    """Must hold (3): no factor N; all layers of a sequence are pooled; padding does not count."""
    even = torch.eye(3).repeat(2, 2, 1) * 1.0
    assert _balance({"a": even, "b": even}) == pytest.approx(1 / 3)
    one = torch.zeros(2, 6, 3)
    one[..., 0] = 1
    assert _balance({"a": one}) == pytest.approx(1)
    assert _balance({"a": one, "b": one.flip(-1)}) == pytest.approx(1 / 2)
    mixed = torch.cat([one[:, :3], one[:, :3].flip(-1)], 1)
    assert _balance({"a": mixed}, torch.tensor([[1, 1, 1, 0, 0, 0]] * 2)) == pytest.approx(1)
    with pytest.raises(StateError, match=r"\[2, 3\] experts"):
        _balance({"a": one, "b": torch.rand(2, 6, 2)})


def test_each_token_touches_one_expert():
    """Must hold (4): another expert's values do not reach a token, bit for bit."""
    model, bank = _moved()
    site = next(s for s in bank.sites("default") if s.name == "layers.1.mlp.down_proj")
    bank.selector.notes = notes = Notes(("experts",))
    before = model(X)
    chosen = notes["experts"]["layers.1.mlp.down_proj"][..., 0]
    bank.selector.notes = None
    with torch.no_grad():
        site.adapter.experts.B[1] += 1
    after = model(X)
    assert set(chosen.unique().tolist()) > {1}
    assert torch.equal(after[chosen != 1], before[chosen != 1])
    assert not torch.allclose(after[chosen == 1], before[chosen == 1], atol=1e-3)


def test_one_expert_is_lora():
    """Must hold (5)."""
    model, bank = _moved(n=1)
    twin = tower()
    other = rl.attach(twin, rl.LoRA(r=2, lora_alpha=4.0), target_modules=MLP)
    for ours, theirs in zip(bank.sites("default"), other.sites("default")):
        theirs.adapter.load_state_dict({k: v[0] for k, v in ours.adapter.experts.state_dict().items()})
    assert torch.allclose(model(X), twin(X), atol=1e-12)


def test_it_computes_one_lora_and_a_router():
    """Must hold (6): operations do not grow with the number of experts, but for the router's."""
    counted = {}
    for n in (1, 3, 6):
        model, _ = _moved(n=n)
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            model(X)
        counted[n] = flops.get_total_flops() - 2 * 2 * 10 * D * n
    assert counted[1] == counted[3] == counted[6], counted


def test_the_parts_of_a_model_without_blocks_are_refused_by_name():
    with pytest.raises(TargetError, match="'0' is a linear|outside of the model's blocks|hidden states is unknown"):
        rl.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), rl.llava_mole(), target_modules=["0"])
    with pytest.raises(TargetError, match="'fc' is a linear outside of the model's blocks"):
        rl.attach(torch.nn.ModuleDict({"fc": torch.nn.Linear(4, 4)}), rl.llava_mole(), target_modules=["fc"])


def test_a_layer_called_alone_says_what_it_waits_for():
    model, _ = _moved()
    with pytest.raises(StateError, match=r"input of 'layers.0.mlp', which is not running"):
        model.layers[0].mlp.up_proj(X)
    assert torch.isfinite(model.layers[0].mlp(X)).all()
