"""Half precision, casting, autocast, and the meta device."""

import pytest
import torch
from core_tiny import adapted, difference, llama, nudge, tower, words

import rankloom as rl

IDS = words()

METHODS = [
    rl.LoRA(r=2),
    rl.DoRA(rl.LoRA(r=2)),
    rl.VeRA(r=3),
    rl.hydralora(r=2, n_b=2),
    rl.LoRA(r=2, init_lora_weights="pissa"),
]
LINEAR = {"target_modules": ["q_proj", "v_proj"]}
PLAN = {"target_modules": ["q_proj", "v_proj", "embed"]}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS[:4], ids=str)
def test_half_precision_bases_have_float32_adapters(dtype, method):
    model = tower().to(dtype)
    base = model(IDS)
    bank = rl.attach(model, method, **LINEAR)
    assert torch.equal(model(IDS), base) or difference(model(IDS).float(), base.float()) < 2e-2
    assert {p.dtype for _, p, _ in bank.tensors("default")} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "adapters" not in n} == {dtype}
    nudge(bank)
    out = model(IDS)
    assert out.dtype == dtype
    if not isinstance(method, rl.Mixture):
        bank.merge()
        assert {p.dtype for n, p in model.named_parameters() if "adapters" not in n} == {dtype}
        assert difference(model(IDS).float(), out.float()) < 0.05


def test_gradients_of_half_precision_models_are_float32():
    model = tower().bfloat16()
    bank = rl.attach(model, rl.LoRA(r=2), **PLAN)
    nudge(bank)
    model(IDS).float().sum().backward()
    assert {p.grad.dtype for _, p, _ in bank.trainable()} == {torch.float32}


def test_the_dtype_of_the_adapters_can_be_chosen():
    bank = rl.attach(tower(), rl.LoRA(r=2), dtype="bfloat16", **PLAN)
    assert {p.dtype for _, p, _ in bank.tensors("default")} == {torch.bfloat16}
    with torch.no_grad():
        assert bank.model(IDS).dtype == torch.float64


@torch.no_grad()
@pytest.mark.parametrize("change", [lambda m: m.to(torch.float32), lambda m: m.half(), lambda m: m.bfloat16()])
def test_casting_takes_the_adapters_along(change):
    model, bank = adapted("a")
    out = model(IDS)
    change(model)
    assert len({p.dtype for p in model.parameters()}) == 1
    assert difference(model(IDS).double(), out) < 0.05
    bank.merge()
    assert difference(model(IDS).double(), out) < 0.05


@torch.no_grad()
def test_casting_while_merged():
    model, bank = adapted("a")
    bank.use("a")
    bank.merge()
    model.float()
    bank.unmerge()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(IDS).dtype == torch.float32


def test_autocast():
    model, _bank = adapted("a", model=tower().float())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(IDS)
    assert out.dtype == torch.bfloat16
    assert difference(out.float(), model(IDS)) < 0.05


@pytest.mark.parametrize("method", [*METHODS, rl.AdaLoRA(init_r=3, target_r=2)], ids=str)
def test_attaching_on_the_meta_device_counts_without_memory(method):
    with torch.device("meta"):
        model = llama()
    plan = {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]}
    bank = rl.attach(model, method, **plan)
    assert all(p.is_meta for p in model.parameters())
    real = rl.attach(llama(), method, **plan)
    shapes = [(key, tuple(p.shape), p.requires_grad) for key, p, _ in bank.tensors("default")]
    assert shapes == [(key, tuple(p.shape), p.requires_grad) for key, p, _ in real.tensors("default")]


def test_a_model_that_comes_from_the_meta_device_can_be_reset():
    with torch.device("meta"):
        model = tower()
    bank = rl.attach(model, rl.LoRA(r=2), **PLAN)
    model.to_empty(device="cpu")
    model.load_state_dict(tower().state_dict(), strict=False)
    bank.reset("default")
    for site, adapter in bank.adapters():
        zero, noise = (adapter.A, adapter.B) if site == "embed" else (adapter.B, adapter.A)
        assert zero.abs().max() == 0
        assert 0 < noise.abs().max() < 10
