"""accelerate's offload hooks, installed before and after the adapters."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from core_tiny import difference, llama, nudge, snapshot, tokens, tower, words

import rankloom as rl

IDS = words()
METHODS = [rl.LoRA(r=2), rl.DoRA(rl.LoRA(r=2)), rl.VeRA(r=3), rl.LoRA(r=2, init_lora_weights="svd")]
PLAN = {"target_modules": ["q_proj", "v_proj"]}


def offloaded(model, how, folder):
    if how == "cpu":
        return cpu_offload(model, execution_device="cpu")
    device_map = {name: "disk" for name, _ in model.named_children()}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder))


def without_identities(model):
    """accelerate itself makes new tensors in every pass."""
    return {name: facts[:4] + facts[5:] for name, facts in snapshot(model)[0].items()}


def outputs_without_hooks(method, **plan):
    model = tower()
    torch.manual_seed(5)
    bank = rl.attach(model, method, **plan)
    nudge(bank)
    with torch.no_grad():
        return model(IDS)


@torch.no_grad()
@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_hooks_before_the_adapters(how, method, tmp_path):
    expected, base = outputs_without_hooks(method, **PLAN), tower()(IDS)
    model = offloaded(tower(), how, tmp_path)
    before, forwards = without_identities(model), [m.__dict__.get("_old_forward") for m in model.modules()]
    assert model.layers[0].q_proj.weight.is_meta
    torch.manual_seed(5)
    bank = rl.attach(model, method, **PLAN)
    assert not any(p.is_meta for _, p, _ in bank.tensors("default"))
    assert difference(model(IDS), base) < 1e-12
    nudge(bank)
    assert difference(model(IDS), expected) < 1e-12
    assert model.layers[0].q_proj.weight.is_meta
    with pytest.raises(rl.RankloomError, match="is offloaded"):
        bank.merge()
    rl.detach(model)
    assert without_identities(model) == before
    assert [m.__dict__.get("_old_forward") for m in model.modules()] == forwards
    assert torch.equal(model(IDS), base)


@torch.no_grad()
@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_hooks_after_the_adapters(how, method, tmp_path):
    expected = outputs_without_hooks(method, **PLAN)
    model = tower()
    torch.manual_seed(5)
    bank = rl.attach(model, method, **PLAN)
    nudge(bank)
    offloaded(model, how, tmp_path)
    assert difference(model(IDS), expected) < 1e-12
    with bank.using():
        assert torch.equal(model(IDS), tower()(IDS))
    assert not any(p.is_meta for _, p, _ in bank.tensors("default")), "adapters stay in memory"
    rl.detach(model)
    assert torch.equal(model(IDS), tower()(IDS))
    assert {type(m) for m in model.modules()} == {type(m) for m in tower().modules()}


@torch.no_grad()
@pytest.mark.parametrize("after", [False, True])
def test_whole_modules_and_token_rows_under_hooks(after):
    plan = {"target_modules": ["q_proj"], "modules_to_save": ["head"], "trainable_token_indices": [2, 3], "bias": "all"}
    expected = outputs_without_hooks(rl.LoRA(r=2), **plan)
    model = tower() if after else cpu_offload(tower(), execution_device="cpu")
    torch.manual_seed(5)
    bank = rl.attach(model, rl.LoRA(r=2), **plan)
    nudge(bank)
    if after:
        cpu_offload(model, execution_device="cpu")
    for _ in range(2):
        assert difference(model(IDS), expected) < 1e-12
    rl.detach(model)
    assert torch.equal(model(IDS), tower()(IDS))


@torch.no_grad()
def test_hooks_taken_off_while_adapted():
    model = cpu_offload(tower(), execution_device="cpu")
    torch.manual_seed(5)
    bank = rl.attach(model, rl.LoRA(r=2), **PLAN)
    nudge(bank)
    remove_hook_from_module(model, recurse=True)
    assert difference(model(IDS), outputs_without_hooks(rl.LoRA(r=2), **PLAN)) < 1e-12
    rl.detach(model)
    assert torch.equal(model(IDS), tower()(IDS))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("method", METHODS[:3], ids=str)
def test_training_under_hooks(after, method):
    plan = PLAN | {"modules_to_save": ["head"]}
    model, plain = tower(), tower()
    if not after:
        cpu_offload(model, execution_device="cpu")
    bank, other = (rl.attach(m, method, **plan) for m in (model, plain))
    for mine, theirs in zip(bank.tensors("default"), other.tensors("default")):
        theirs[1].data.copy_(mine[1])
    nudge(bank)
    nudge(other)
    if after:
        cpu_offload(model, execution_device="cpu")
    trained = list(bank.trainable())
    model(IDS).square().sum().backward()
    plain(IDS).square().sum().backward()
    assert len(trained) == len(list(other.trainable()))
    for (key, mine, _), (_, theirs, _) in zip(trained, other.trainable()):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=key)
    frozen = [p for n, p in model.named_parameters() if ".adapters." not in n and not n.startswith("head")]
    assert not any(p.requires_grad for p in frozen)


@torch.no_grad()
def test_a_dispatched_language_model_generates(tmp_path):
    ids = tokens()
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    texts = []
    for dispatched in (False, True):
        model = llama()
        if dispatched:
            blocks = {f"model.layers.{i}": place for i, place in enumerate(("cpu", "disk"))}
            others = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
            model = dispatch_model(
                model, blocks | others, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
            )
        torch.manual_seed(5)
        bank = rl.attach(model, rl.LoRA(r=2), target_modules="all-linear")
        nudge(bank, size=0.6)
        texts.append(model.generate(ids, **settings))
    assert torch.equal(*texts)
