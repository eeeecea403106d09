"""LoRA-Flow (arXiv 2402.11455): weights of frozen adapters for every token and block."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from gate_tools import SEVEN, D, members, shake, tower
from torch.utils.checkpoint import checkpoint

import rankloom as rl
import tiny
from rankloom.errors import FileError, NotMergeable, SettingsError, StateError, TargetError

X = torch.randn(2, 6, D, generator=torch.Generator().manual_seed(5)).double()
TWO = (rl.LoRA(r=2, lora_alpha=4), rl.LoRA(r=5, lora_alpha=3))


def flow(*methods, **settings):
    model = tower()
    names = tuple("abcdef"[: len(methods or TWO)])
    bank = members(model, *(methods or TWO))
    rl.attach(model, rl.lora_flow(names, **settings), "flow")
    return model, bank


def test_count_is_that_of_the_paper():
    """Must hold (1): L·k(d+1) numbers train; 262 208 for Llama-2 7B and two adapters."""
    _, bank = flow()
    bank.use("flow")
    assert sum(p.numel() for _, p, _ in bank.trainable()) == 2 * 2 * (D + 1)
    assert 32 * 2 * (4096 + 1) == 262_208


@pytest.mark.parametrize("j", [0, 1, -1])
def test_weights_of_zero_and_a_unit_bias_are_one_adapter(j):
    """Must hold (2): W_g = 0 and b = e_j − 1/k is adapter j; that is how the bias starts."""
    model, bank = flow(start=j)
    with torch.no_grad():
        for _, p, _ in bank.tensors("flow"):
            if p.ndim == 2:
                p.zero_()
    bank.use("ab"[j])
    alone = model(X)
    bank.use("flow")
    assert torch.allclose(model(X), alone, atol=1e-7)
    assert not torch.allclose(model(X), tower()(X), atol=1e-2)


def test_all_projections_of_a_block_have_the_same_weights():
    """Must hold (3): one tensor for the seven, another for the next block."""
    model, bank = flow()
    shake(bank, "flow", 3)
    seen = {}
    for site in bank.sites("flow"):
        site.adapter.gate.register_forward_hook(lambda m, a, out, n=site.name: seen.update({n: out}))
    with bank.using("flow"), torch.no_grad():
        model(X)
    assert len(seen) == 14
    for block in range(2):
        own = {id(v) for k, v in seen.items() if k.startswith(f"layers.{block}.")}
        assert len(own) == 1
    one, two = seen["layers.0.q_proj"], seen["layers.1.q_proj"]
    assert one.shape == (2, 6, 2)
    assert one.dtype == torch.float32
    assert not torch.equal(one, two)


def test_by_hand_with_members_of_any_rank():
    """Mechanism: h + Σ_i w_ti Δh_i, w = softmax(W x/τ) + b on the block's input, b outside. (5): Σ w = 1 + Σ b."""
    model, bank = flow(temperature=0.7)
    shake(bank, "flow", 3)
    taken = {}
    layer = model.layers[1]
    hooks = [
        layer.register_forward_pre_hook(lambda m, args: taken.update(block=args[0])),
        layer.mlp.up_proj.register_forward_hook(lambda m, args, out: taken.update(x=args[0], out=out)),
    ]
    with bank.using("flow"), torch.no_grad():
        model(X)
    for hook in hooks:
        hook.remove()
    site = next(s for s in bank.sites("flow") if s.name == "layers.1.mlp.up_proj")
    scores = site.adapter.gate.scores
    w = torch.softmax(taken["block"].float() @ scores.weight.float().T / 0.7, -1) + scores.bias.float()
    assert torch.allclose(w.sum(-1), (1 + scores.bias.float().sum()).expand(2, 6), atol=1e-6)
    wanted = taken["x"] @ layer.mlp.up_proj.weight.T
    for i, name in enumerate("ab"):
        own = next(s for s in bank.sites(name) if s.name == site.name)
        wanted = wanted + w[..., i, None].double() * (taken["x"] @ own.adapter.delta(own.base).T)
    assert torch.allclose(taken["out"], wanted, atol=1e-6)


def test_base_and_members_have_no_gradient():
    """Must hold (6): only W_g and b train; members are free again once the blend is gone."""
    model, bank = flow()
    shake(bank, "flow", 3)
    bank.use("flow")
    model.train()(X).square().sum().backward()
    with_grad = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_grad
    assert all("shared.flow" in n for n in with_grad), with_grad
    assert not any(p.requires_grad for n in "ab" for _, p, _ in bank.tensors(n))
    rl.detach(model, "flow")
    assert all(p.requires_grad for n in "ab" for _, p, _ in bank.tensors(n))
    assert not model.layers[0]._forward_pre_hooks


def test_tokens_that_need_different_adapters_are_told_apart():
    """Must hold (7): even tokens need adapter 0, odd ones adapter 1; the gate parts them, no static weights can."""
    torch.manual_seed(0)
    x = torch.randn(8, 6, D).double()
    odd = (torch.arange(6) % 2).bool()
    x[:, ~odd, 0], x[:, odd, 0] = 3.0, -3.0
    model = tower(blocks=1)
    layer = model.layers[0].mlp.up_proj
    bank = members(model, *TWO, targets=["mlp.up_proj"])
    rl.attach(model, rl.lora_flow(("a", "b"), start=None), "flow")
    taken = {}
    layer.register_forward_hook(lambda m, args, out: taken.update(out=out))
    answers = {}
    for name in "ab":
        with bank.using(name), torch.no_grad():
            model(x)
            answers[name] = taken["out"].detach()
    with bank.using(), torch.no_grad():
        model(x)
        base = taken["out"].detach()
    wanted = torch.where(odd[None, :, None], answers["b"], answers["a"])
    changes = torch.stack([(answers[n] - base).flatten() for n in "ab"], -1)
    best = torch.linalg.lstsq(changes, (wanted - base).flatten()[:, None]).solution
    static = (changes @ best - (wanted - base).flatten()[:, None]).square().mean().item()
    bank.use("flow")
    optimizer = torch.optim.Adam([p for _, p, _ in bank.trainable()], lr=5e-2)
    for _ in range(200):
        optimizer.zero_grad()
        model(x)
        loss = (taken["out"] - wanted).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * static, (loss.item(), static)


@pytest.mark.parametrize(
    "methods",
    [
        (rl.DoRA(rl.LoRA(r=2)), rl.LoRA(r=3)),
        (rl.LoRA(r=2, lora_bias=True), rl.VeRA(r=4)),
        (rl.LoRA(r=2, lora_dropout=0.5), rl.molora(n=2, r=2)),
        (rl.Slices(rl.LoRA(r=2), parts=2, on=(0,)), rl.AdaLoRA(init_r=3, target_r=2)),
    ],
    ids=["dora", "bias", "mixture", "slices"],
)
def test_members_may_be_of_any_method(methods):
    """The sum of the members' own changes, whatever they are."""
    model, bank = flow(*methods)
    shake(bank, "flow", 3)
    site = next(s for s in bank.sites("flow") if s.name == "layers.1.q_proj")
    taken = {}
    site.layer.register_forward_hook(lambda m, args, out: taken.update(x=args[0], out=out))
    site.adapter.gate.register_forward_hook(lambda m, args, out: taken.update(w=out))
    with bank.using("flow"), torch.no_grad():
        model(X)
        out, w, x = taken["out"], taken["w"].double(), taken["x"]
    with bank.using(), torch.no_grad():
        y = site.layer(x)
    each = [site.layer.adapters["layer"][n](x, y, site.base) for n in "ab"]
    assert torch.allclose(out, y + sum(w[..., i, None] * c for i, c in enumerate(each)), atol=1e-9)


def test_it_is_attached_where_any_member_is():
    model = tower()
    rl.attach(model, rl.LoRA(r=2), "a", target_modules=["q_proj"])
    bank = rl.attach(model, rl.LoRA(r=2), "b", target_modules=["up_proj", "layers.0.q_proj"])
    rl.attach(model, rl.lora_flow(("a", "b")), "flow")
    wanted = {s.name for n in "ab" for s in bank.sites(n)}
    assert {s.name for s in bank.sites("flow")} == wanted
    with pytest.raises(TargetError, match=r"adapter 'b' also changes 'layers\.\d\.mlp\.up_proj'"):
        rl.attach(model, rl.lora_flow(("a", "b")), "other", target_modules=["q_proj"])
    assert bank.names == ("a", "b", "flow")


def test_missing_and_leaving_members_are_refused_by_name():
    model, bank = flow()
    with pytest.raises(
        TargetError, match=r"builds on the adapter 'c', which is not in the bank: attach or load it first"
    ):
        rl.attach(model, rl.lora_flow(("a", "c")), "more")
    with pytest.raises(StateError, match="'flow' builds on 'a': detach 'flow' first"):
        rl.detach(model, "a")
    with pytest.raises(SettingsError, match="each member once"):
        rl.lora_flow(("a", "a"))
    with pytest.raises(TargetError, match="nothing to blend at 'layers.0.q_proj'"):
        rl.attach(tower(), rl.lora_flow(), target_modules=SEVEN)
    bank.use("flow")
    with pytest.raises(NotMergeable, match="depends on the input of 'layers.0'"):
        bank.merge()
    rl.detach(model)
    assert torch.equal(model(X), tower()(X))


def test_a_file_names_its_members(tmp_path):
    model, bank = flow()
    shake(bank, "flow", 3)
    bank.use("flow")
    said = model(X)
    for name in ("a", "b", "flow"):
        rl.save(model, tmp_path / name, name=name)
    fresh = tower()
    with pytest.raises(FileError, match=r"builds on the adapter 'a'.*load it first"):
        rl.load(fresh, tmp_path / "flow", name="flow")
    assert not hasattr(fresh, "rankloom")
    for name in ("a", "b", "flow"):
        again = rl.load(fresh, tmp_path / name, name=name)
    again.use("flow")
    assert torch.equal(fresh(X), said)


def test_copies_pickles_rows_and_checkpointing():
    model, bank = flow()
    shake(bank, "flow", 3)
    bank.use("flow")
    said = model(X)
    twin = copy.deepcopy(model)
    assert torch.allclose(twin(X), said, atol=1e-12)
    assert torch.allclose(pickle.loads(pickle.dumps(model))(X), said, atol=1e-12)
    shake(twin.rankloom, "a", 9)
    assert torch.allclose(model(X), said, atol=1e-12)
    assert not torch.allclose(twin(X), said, atol=1e-3)
    with bank.using(rows=["flow", "a"]):
        mixed = model(X)
    with bank.using("a"):
        assert torch.allclose(mixed[1], model(X)[1], atol=1e-10)
    assert torch.allclose(mixed[0], said[0], atol=1e-10)
    grads = []
    for again in (False, True):
        model.zero_grad()
        y = X.clone().requires_grad_()
        for layer in model.layers:
            y = checkpoint(layer, y, use_reentrant=False) if again else layer(y)
        y.square().sum().backward()
        grads.append([p.grad.clone() for _, p, _ in bank.trainable()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_constant_blend_merges():
    from rankloom.gates.constant import Constant

    model = tower()
    bank = members(model, *TWO)
    rl.attach(model, rl.Blend(("a", "b"), Constant((0.25, 2.0)), scale=0.5), "mix")
    bank.use("mix")
    said = model(X)
    bank.use(a=0.125, b=1.0)
    assert torch.allclose(model(X), said, atol=1e-6)
    bank.merge("mix")
    assert torch.allclose(model(X), said, atol=1e-6)


def test_cached_generation_is_the_full_forward():
    """Must hold (4): token by token with a cache, the logits are those of one pass over all."""
    model = tiny.llama(vocab_size=31).eval()
    bank = members(model, *TWO)
    rl.attach(model, rl.lora_flow(("a", "b")), "flow")
    shake(bank, "flow", 3, std=2.0)
    bank.use("flow")
    ids = torch.randint(3, 31, (2, 7))
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        held, steps = None, []
        for at in range(7):
            out = model(ids[:, at : at + 1], past_key_values=held, use_cache=True)
            held = out.past_key_values
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), full, atol=1e-5)
    bank.use("a")
    assert not torch.allclose(model(ids, use_cache=False).logits, full, atol=1e-2)
