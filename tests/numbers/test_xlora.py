"""X-LoRA (arXiv 2402.07148): frozen adapters weighed by a classifier of the base's own hidden states."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from gate_tools import members, shake, tower

import peft
import rankloom as rl
import tiny
from rankloom.errors import StateError, TargetError

IDS = torch.randint(3, 31, (2, 7), generator=torch.Generator().manual_seed(0))
TARGETS = ["q_proj", "v_proj", "down_proj"]
TWO = (rl.LoRA(r=2, lora_alpha=4), rl.LoRA(r=5, lora_alpha=3))


def llama():
    return tiny.llama(vocab_size=31, initializer_range=0.3, bos_token_id=1, eos_token_id=2).eval()


def blended(*methods, **settings):
    model = llama()
    bank = members(model, *(methods or TWO), targets=TARGETS)
    rl.attach(model, rl.xlora(tuple("abc"[: len(methods or TWO)]), **settings), "x")
    shake(bank, "x", 3, std=1.0)
    bank.use("x")
    return model, bank


@torch.no_grad()
def logits(model, ids=IDS, **more):
    return model(ids, use_cache=False, **more).logits


def cache_of(out):
    return next(v for v in out.values() if hasattr(v, "get_seq_length"))


def classifier(bank):
    return bank.shared_of("x").get_submodule("first_pass")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, 16 * 2 + 2),
        ({"layerwise_scalings": True}, (16 + 1) * 2 * 6),
        ({"xlora_depth": 2, "xlora_size": 5}, 16 * 5 + 5 + 5 * 2 + 2),
        ({"xlora_depth": 3, "xlora_size": 5}, 16 * 5 + 5 + 5 * 5 + 5 + 5 * 2 + 2),
    ],
)
def test_count(settings, wanted):
    """Must hold (1): the classifier alone: d·N + N, or d·N·L + N·L layerwise; (5) the members have no gradient."""
    model, bank = blended(**settings)
    assert sum(p.numel() for _, p, _ in bank.trainable()) == wanted
    assert {role for _, _, role in bank.trainable()} == {"router"}
    model(IDS).logits.square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if "shared.x." in n
    }


def test_even_weights_of_equal_adapters_are_the_adapter():
    """Must hold (2)."""
    model, bank = blended(TWO[0], TWO[0])
    with torch.no_grad():
        for (_, a, _), (_, b, _) in zip(bank.tensors("a"), bank.tensors("b")):
            b.copy_(a)
        for p in classifier(bank).parameters():
            p.zero_()
    mixed = logits(model)
    bank.use("a")
    assert torch.allclose(mixed, logits(model), atol=1e-5)
    assert not torch.allclose(mixed, logits(llama()), atol=1e-1)


def test_the_first_pass_is_the_base_and_the_second_mixes_by_its_states():
    """Must hold (3) and the mechanism by hand: λ = softmax(C h), h of the base alone, on every site and token."""
    model, bank = blended(global_scaling_weight=0.5)
    passes, seen = [], {}
    model.model.register_forward_hook(lambda m, args, out: passes.append(out.last_hidden_state.detach()))
    site = next(s for s in bank.sites("x") if s.name.endswith("layers.1.mlp.down_proj"))
    site.layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0], out=out))
    logits(model)
    base = llama().model(IDS).last_hidden_state.detach()
    assert len(passes) == 2
    assert torch.equal(passes[0], base)
    head = classifier(bank).layers[0]
    w = torch.softmax(base @ head.weight.T + head.bias, -1)
    wanted = seen["x"] @ site.layer.weight.T
    for i, name in enumerate("ab"):
        own = next(s for s in bank.sites(name) if s.name == site.name)
        wanted = wanted + 0.5 * w[..., i, None] * (seen["x"] @ own.adapter.delta(own.base).T)
    assert torch.allclose(seen["out"], wanted, atol=1e-5)


def test_layerwise_has_weights_of_its_own_for_every_site():
    model, bank = blended(layerwise_scalings=True)
    seen = {}
    for site in bank.sites("x"):
        site.adapter.gate.register_forward_hook(lambda m, a, out, n=site.name: seen.update({n: out}))
    logits(model)
    values = list(seen.values())
    assert len(values) == 6
    assert all(not torch.allclose(a, b) for i, a in enumerate(values) for b in values[:i])
    assert all(torch.allclose(v.sum(-1), torch.ones(2, 7), atol=1e-5) for v in values)


def test_top_k_sums_to_one_for_each_token():
    """Must hold (4): of k chosen adapters the weights of a token sum to 1 (the original normalised over the batch)."""
    _, bank = blended(*TWO, rl.LoRA(r=3), top_k_lora=2)
    model = bank.model
    seen = []
    bank.sites("x")[0].adapter.gate.register_forward_hook(lambda m, a, out: seen.append(out))
    logits(model)
    assert torch.allclose(seen[0].sum(-1), torch.ones(2, 7), atol=1e-6)
    assert ((seen[0] > 0).sum(-1) == 2).all()


@pytest.mark.parametrize("settings", [{}, {"layerwise_scalings": True}, {"xlora_depth": 2, "xlora_size": 5}])
def test_peft_agrees(tmp_path, settings):
    """Peers: PEFT's XLora with the same adapters and classifier gives the same logits."""
    model, bank = blended(softmax_temperature=0.7, global_scaling_weight=1.5, **settings)
    for name in "ab":
        rl.save(model, tmp_path / name, name=name)
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=16,
        adapters={str(i): str(tmp_path / name) for i, name in enumerate("ab")},  # any other names fail in PEFT
        softmax_temperature=0.7,
        global_scaling_weight=1.5,
        xlora_dropout_p=0.0,
        **settings,
    )
    base = llama()
    base.config.use_cache = False
    theirs = peft.get_peft_model(base, config).eval()
    inner = theirs.base_model.internal_xlora_classifier
    ours = [m for m in classifier(bank).layers if isinstance(m, torch.nn.Linear)]
    linears = [m for m in inner.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == len(ours)
    order = list(range(6))
    if settings.get("layerwise_scalings"):
        layers = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        names = [s.name for s in bank.sites("x")]
        order = [names.index(next(n for n in names if layer.endswith(n))) for layer in layers]
    with torch.no_grad():
        for mine, other in zip(ours, linears):
            weight, bias = mine.weight, mine.bias
            if settings.get("layerwise_scalings"):
                weight = weight.unflatten(0, (6, 2))[order].flatten(0, 1)
                bias = bias.unflatten(0, (6, 2))[order].flatten(0, 1)
            other.weight.copy_(weight)
            other.bias.copy_(bias)
        found = theirs(input_ids=IDS).logits
    assert torch.allclose(logits(model), found, atol=1e-4)
    assert not torch.allclose(logits(llama()), found, atol=1e-1)


def _steps(model, ids, **more):
    held, steps = None, []
    with torch.no_grad():
        for at in range(ids.shape[1]):
            out = model(ids[:, at : at + 1], cache=held, use_cache=True, **more)
            held = cache_of(out)
            steps.append(out.logits)
    return torch.cat(steps, 1), held


def test_cached_generation_is_a_full_run():
    """Must hold (6): weights are computed anew for each token, from the base's own cache, as in a run over all."""
    model, bank = blended()
    full = logits(model)
    cached, _ = _steps(model, IDS)
    assert torch.allclose(cached, full, atol=1e-5)
    bank.use("a")
    assert not torch.allclose(logits(model), full, atol=1e-1)
    assert torch.allclose(_steps(model, IDS)[0], logits(model), atol=1e-5)


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generate_with_and_without_cache_are_the_same(how):
    model, bank = blended()
    mask = torch.ones_like(IDS)
    found = [model.generate(IDS, attention_mask=mask, max_new_tokens=8, use_cache=use, **how) for use in (True, False)]
    assert torch.equal(*found)
    bank.use("a")
    other = model.generate(IDS, attention_mask=mask, max_new_tokens=8, **how)
    assert other.shape != found[0].shape or not torch.equal(other, found[0])


def test_caches_of_others_are_refused_and_copies_go_on():
    model, bank = blended()
    bank.use("a")
    _, held = _steps(model, IDS[:, :4])
    bank.use("x")
    with pytest.raises(StateError, match="the cache has 4 tokens, and the first pass of this adapter has seen 0"):
        model(IDS[:, 4:5], cache=held, use_cache=True)
    _, held = _steps(model, IDS[:, :4])
    full = logits(model)
    for cache in (copy.deepcopy(held), held):
        with torch.no_grad():
            again = model(IDS[:, 4:], cache=cache, use_cache=True).logits
        assert torch.allclose(again, full[:, 4:], atol=1e-5)


def test_the_first_pass_runs_only_where_it_is_needed():
    model, bank = blended()
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    for names, wanted in (((), 1), (("a",), 1), (("x",), 2)):
        passes.clear()
        bank.use(*names)
        logits(model)
        assert len(passes) == wanted
    with bank.using():
        assert torch.equal(logits(model), logits(llama()))


def test_threads_have_first_passes_of_their_own():
    model, _ = blended()
    batches = [IDS, IDS.flip(1), (IDS + 5) % 28 + 3]
    wanted = [logits(model, ids) for ids in batches]
    faults = []

    def work(ids, said):
        for _ in range(6):
            faults.extend(["another thread's weights"] * (not torch.equal(logits(model, ids), said)))

    workers = [threading.Thread(target=work, args=pair) for pair in zip(batches, wanted)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not faults


def test_gradient_checkpointing_recomputes_with_the_same_weights():
    model, bank = blended()
    grads = []
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        for _ in range(2):
            out = model(IDS, use_cache=False).logits
            out.square().sum().backward()
        grads.append([p.grad.clone() for p in classifier(bank).parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads))
    one, two = model(IDS, use_cache=False).logits, model(IDS.flip(1), use_cache=False).logits
    with pytest.raises(StateError, match="2 forward passes wait for a backward pass"):
        (one.sum() + two.sum()).backward()
    del one, two
    model.zero_grad()
    model(IDS, use_cache=False).logits.square().sum().backward()


def test_files_copies_and_detach(tmp_path):
    model, bank = blended(layerwise_scalings=True)
    said = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), said)
    for name in ("a", "b", "x"):
        rl.save(model, tmp_path / name, name=name)
    fresh = llama()
    for name in ("a", "b", "x"):
        again = rl.load(fresh, tmp_path / name, name=name)
    again.use("x")
    assert torch.equal(logits(fresh), said)
    rl.detach(model)
    assert torch.equal(logits(model), logits(llama()))
    assert not model.model._forward_pre_hooks


def test_an_exception_leaves_nothing_behind():
    model, _ = blended()
    said = logits(model)
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="stop"):
            logits(model)
    hook.remove()
    assert torch.equal(logits(model), said)
    from rankloom.core.taps import tapped

    assert tapped("first_pass") is None


def test_models_that_do_not_tell_their_states_are_refused_by_name():
    model = tower()
    members(model, *TWO, targets=["q_proj"])
    rl.attach(model, rl.xlora(("a", "b")), "x")
    model.rankloom.use("x")
    assert torch.isfinite(model(torch.randn(2, 3, 8).double())).all()  # a model of states: its output is of their width
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    rl.attach(plain, rl.LoRA(r=1), "a", target_modules=["0"])
    with pytest.raises(TargetError, match=r"at '0' the width of hidden states is unknown"):
        rl.attach(plain, rl.xlora(("a",)), "x")


def test_it_learns_which_adapter_a_context_needs():
    """Planted: sequences that begin with a 4 need adapter a, those with a 5 adapter b. The gate learns it from outputs;
    no fixed weights can."""
    model, bank = blended()
    ids = torch.randint(6, 31, (12, 5), generator=torch.Generator().manual_seed(1))
    first = torch.arange(12) % 2
    ids[:, 0] = 4 + first
    answers = {}
    for name in "ab":
        bank.use(name)
        answers[name] = logits(model, ids)
    wanted = torch.where(first[:, None, None] == 1, answers["b"], answers["a"])
    losses = {}
    for weight in torch.linspace(0, 1, 6).tolist():
        bank.use(a=1 - weight, b=weight)
        losses[weight] = (logits(model, ids) - wanted).square().mean().item()
    bank.use("x")
    with torch.no_grad():
        for p in classifier(bank).parameters():
            p.zero_()
    optimizer = torch.optim.Adam([p for _, p, _ in bank.trainable()], lr=5e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(ids, use_cache=False).logits - wanted).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * min(losses.values()), (loss.item(), losses)
