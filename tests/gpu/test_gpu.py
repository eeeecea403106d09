"""On a CUDA device: kernels, fused functions, packed and bridged bases, mixed batches, compiled code, a training run.

Skipped where there is none: `pytest -m gpu tests/gpu` on a machine with one.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rankloom as rl
import tiny
from rankloom.core.kinds import kind_of
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ALL = {"target_modules": "all-linear"}
METHODS = {
    "lora": rl.LoRA(r=4),
    "dropout": rl.LoRA(r=4, lora_dropout=0.2),
    "lora_fa": rl.LoRA(r=4, frozen="A"),
    "dora": rl.DoRA(rl.LoRA(r=4)),
    "vera": rl.VeRA(r=16),
    "adalora": rl.AdaLoRA(init_r=4, target_r=2),
    "dylora": rl.DyLoRA(r=4),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture(autouse=True)
def _exact_products():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()


def llama(dtype=torch.float32, **settings):
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
    return tiny.llama(**{**sizes, "initializer_range": 0.1, **settings}).to("cuda", dtype)


def nudge(bank, *names):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p, _ in bank.trainable(*names):
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))


def ids(rows=3, tokens=9):
    return torch.randint(1, 64, (rows, tokens), generator=torch.Generator().manual_seed(1)).cuda()


def packed(model, store):
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    keep(model, dict.fromkeys([f"{n}.weight" for n in linear], store))
    return model


def grads(model, bank, run):
    model.zero_grad()
    torch.manual_seed(5)
    loss = run(model)
    loss.backward()
    return loss.detach(), {key: p.grad.clone() for key, p, _ in bank.trainable() if p.grad is not None}


def loss_of(model):
    return model(input_ids=ids(), labels=ids(), use_cache=False).loss


def assert_learns(model, optimizer):
    losses = []
    for _ in range(12):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.02


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def test_kernels_equal_their_references():
    cases = Path(__file__).parents[1] / "ops" / "triton_cases.py"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, cases], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for case in map(json.loads, done.stdout.splitlines()):
        assert case["off"] < (1e-6 if "float32" in case["case"] else 1e-2), case


@pytest.mark.parametrize(
    "store", [NormalFloat(), NormalFloat(bits=3), NormalFloat(double=False), Uniform(bits=4)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_store_reads_the_same_on_both_devices(store, dtype):
    weight = torch.randn(96, 256, dtype=dtype)
    here, there = store.pack(weight), store.pack(weight.cuda())
    assert relative(there.unpack().cpu(), here.unpack()) < 2e-2  # a few codes on the edge fall to the other side
    moved = here.cuda()
    assert torch.equal(moved.unpack().cpu(), here.unpack())
    x = torch.randn(2, 256, device="cuda", dtype=dtype)
    assert relative(F.linear(x, moved), x.double() @ moved.unpack().double().mT) < (
        1e-5 if dtype == torch.float32 else 1e-2
    )


@every_method
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_fused_gradients_are_the_plain_ones_and_those_of_the_cpu(method, base):
    model = llama().train()
    model = packed(model, NormalFloat()) if base == "nf4" else model
    bank = rl.attach(model, method, **ALL)
    nudge(bank)
    bank.selector.fused = False
    loss, wanted = grads(model, bank, loss_of)
    bank.selector.fused = True
    for _ in range(3):
        found_loss, found = grads(model, bank, loss_of)
        assert abs(found_loss - loss) < 1e-4 * abs(loss)
        assert found.keys() == wanted.keys()
        assert all(relative(found[k], wanted[k]) < 2e-3 for k in wanted)
    if not getattr(method, "lora_dropout", 0) and not isinstance(method, rl.DyLoRA):
        model.cpu()
        _, plain = grads(model, bank, lambda m: m(input_ids=ids().cpu(), labels=ids().cpu(), use_cache=False).loss)
        assert all(relative(found[k].cpu(), plain[k]) < 2e-3 for k in wanted)


@every_method
def test_a_bf16_base_trains_float32_adapters_and_merges(method):
    model = llama(torch.bfloat16).train()
    bank = rl.attach(model, method, **ALL)
    assert {p.dtype for _, p, _ in bank.trainable()} == {torch.float32}
    assert_learns(model, torch.optim.AdamW([p for _, p, _ in bank.trainable()], lr=5e-3))
    model.eval()
    with torch.no_grad():
        said = model(ids()).logits
        bank.merge()
        assert relative(model(ids()).logits, said) < 0.05


def test_rows_with_adapters_of_their_own():
    model = llama(torch.bfloat16).eval()
    for i, name in enumerate("abc"):
        bank = rl.attach(model, rl.LoRA(r=2 + 3 * i), name, **ALL)
        nudge(bank, name)
    rows = ["c", None, "a", "b", "a", "c"]
    for tokens in (1, 33):
        x = ids(len(rows), tokens)
        with torch.no_grad():
            with bank.using(rows=rows):
                mixed = model(x, use_cache=False).logits
            for i, name in enumerate(rows):
                with bank.using(*[name] if name else []):
                    alone = model(x[i : i + 1], use_cache=False).logits
                assert relative(mixed[i : i + 1], alone) < 2e-2


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_compiled_without_a_graph_break(method, base):
    model = llama().train()
    model = packed(model, NormalFloat()) if base == "nf4" else model
    bank = rl.attach(model, METHODS[method], **ALL)
    nudge(bank)
    loss, wanted = grads(model, bank, loss_of)
    compiled = torch.compile(model, fullgraph=True)
    found_loss, found = grads(model, bank, lambda _: compiled(ids(), labels=ids(), use_cache=False).loss)
    assert abs(found_loss - loss) < 1e-3 * abs(loss)
    assert all(relative(found[k], wanted[k]) < 1e-2 for k in wanted)


def bitsandbytes_layer(layer, bits):
    bnb = pytest.importorskip("bitsandbytes")
    out, in_ = layer.weight.shape
    if bits == 4:
        new = bnb.nn.Linear4bit(in_, out, bias=False, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(layer.weight.detach().cpu(), requires_grad=False, quant_type="nf4", module=new)
    else:
        new = bnb.nn.Linear8bitLt(in_, out, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(layer.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    return new.cuda()


def torchao_layer(layer, _):
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(layer).requires_grad_(False)
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    return holder[0]


BACKENDS = {"bnb4": (bitsandbytes_layer, 4), "bnb8": (bitsandbytes_layer, 8), "torchao": (torchao_layer, 8)}


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_bases_of_other_libraries(backend, method):
    """Gradients of the decoded twin; merging is exact and is undone; other products than ours round otherwise."""
    model = llama(torch.bfloat16).train()
    twin = copy.deepcopy(model)
    make, bits = backend
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n.endswith(("q_proj", "down_proj"))]
    for name in names:
        layer = make(model.get_submodule(name), bits)
        model.set_submodule(name, layer)
        twin.get_submodule(name).weight.data.copy_(kind_of(layer).weight(layer))
    banks = []
    for each in (model, twin):
        torch.manual_seed(3)
        banks.append(rl.attach(each, METHODS[method], target_modules=names))
    found = []
    for each, bank in zip((model, twin), banks):
        nudge(bank)
        found.append(grads(each, bank, loss_of))
    (loss, mine), (wanted_loss, theirs) = found
    assert abs(loss - wanted_loss) < 2e-2 * abs(wanted_loss)
    assert all(relative(mine[k], theirs[k]) < 0.1 for k in theirs)
    model.eval()
    with torch.no_grad():
        before = model(ids()).logits
        banks[0].merge()
        assert relative(model(ids()).logits, before) < 0.05
        banks[0].unmerge()
        assert torch.equal(model(ids()).logits, before)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_every_optimizer_learns_there(name):
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    from rankloom.train.optim import build_optimizer
    from rankloom.train.settings import TrainSettings

    model = packed(llama(torch.bfloat16).train(), NormalFloat())
    bank = rl.attach(model, rl.LoRA(r=64), **ALL)
    settings = TrainSettings(optimizer=name, lr=2e-3)
    optimizer = build_optimizer([{"params": [p for _, p, _ in bank.trainable()], "lr": settings.lr}], settings)
    assert_learns(model, optimizer)


def test_a_run_there_saves_what_the_cpu_loads(tmp_path):
    model = llama().train()
    bank = rl.attach(model, METHODS["dora"], **ALL)
    nudge(bank)
    rl.save(model, tmp_path / "a")
    with torch.no_grad():
        said = model.eval()(ids()).logits
        other = llama().cpu().eval()
        rl.load(other, tmp_path / "a")
        assert relative(other(ids().cpu()).logits.cuda(), said) < 1e-4
