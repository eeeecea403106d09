"""Bases that bitsandbytes and torchao keep in few bits: read, trained on, merged and given back."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import rankloom as rl
import tiny
from rankloom.core.graft import Grafted
from rankloom.core.kinds import kind_of
from rankloom.errors import StateError, TargetError
from rankloom.store import dense
from rankloom.store.bridges import bridge_of, fourbit
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat

bnb = pytest.importorskip("bitsandbytes")

METHODS = {
    "lora": lambda: rl.LoRA(r=4),
    "dora": lambda: rl.DoRA(rl.LoRA(r=4)),
    "adalora": lambda: rl.AdaLoRA(init_r=4, target_r=2),
    "vera": lambda: rl.VeRA(r=16),
}


def llama(dtype=torch.float32):
    sizes = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 96}
    made = tiny.llama(**sizes, initializer_range=0.2, attention_bias=True, attn_implementation="eager")
    return made.to(dtype).eval()


def four(quant_type="nf4", nested=True):
    def make(layer):
        out, in_ = layer.weight.shape
        new = bnb.nn.Linear4bit(
            in_, out, bias=layer.bias is not None, quant_type=quant_type, compress_statistics=nested
        )
        new.weight = bnb.nn.Params4bit(
            layer.weight.detach(), requires_grad=False, quant_type=quant_type, compress_statistics=nested, module=new
        )
        new.bias = layer.bias
        return new.to("cpu")

    return make


def eight(layer):
    out, in_ = layer.weight.shape
    new = bnb.nn.Linear8bitLt(in_, out, bias=layer.bias is not None, has_fp16_weights=False)
    new.weight = bnb.nn.Int8Params(layer.weight.detach(), requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    return new.to("cpu")


def ao(config):
    def make(layer):
        pytest.importorskip("torchao")
        import torchao.quantization as q

        holder = nn.Sequential(layer).requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            q.quantize_(holder, config(q))
        return holder[0]

    return make


BACKENDS = {
    "bnb_nf4": four(),
    "bnb_fp4": four("fp4", nested=False),
    "bnb_int8": eight,
    "ao_int8": ao(lambda q: q.Int8WeightOnlyConfig()),
    "ao_int4": ao(lambda q: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=q.PerGroup(32))),
}
every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
TARGETS = ["q_proj", "down_proj"]


def quantised(backend, dtype=torch.float32):
    model = llama(dtype)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            model.set_submodule(name, backend(layer))
    return model


def plain_twin(model):
    """The same model with plain linear layers, which hold what the backend's decode to."""
    twin = llama()
    for name, layer in list(model.named_modules()):
        if bridge_of(layer._parameters.get("weight")) is not None:
            mine = twin.get_submodule(name)
            mine.weight.data.copy_(kind_of(layer).weight(layer))
    return twin


def nudge(bank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p, _ in bank.trainable():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


IDS = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(1))


def say(model):
    return model(input_ids=IDS, use_cache=False).logits


@every_backend
@every_method
def test_trains_and_merges_like_its_dense_twin(backend, method):
    """Same loss and gradients as the plain model of the decoded weights; merged in training mode and back, bit for bit."""
    model = quantised(backend)
    twin = plain_twin(model)
    bare, banks = say(model.train()), []
    for each in (model, twin):
        torch.manual_seed(3)
        banks.append(rl.attach(each, method(), target_modules=TARGETS))
        nudge(banks[-1])
        each.train()
    before = say(model).detach()
    gradients = []
    for each, bank in zip((model, twin), banks):
        loss = say(each).square().mean()
        gradients.append(torch.autograd.grad(loss, [p for _, p, _ in bank.trainable()]))
    for mine, theirs in zip(*gradients):
        assert mine.abs().max() > 0
        assert torch.allclose(mine, theirs, rtol=2e-3, atol=1e-5)
    assert torch.allclose(before, say(twin), atol=1e-4)
    layers = [f.layer for f in banks[0].sites("default")]
    classes, weights = [type(m) for m in layers], [m.weight for m in layers]
    banks[0].merge()
    for layer in layers:
        assert type(layer.weight) is nn.Parameter
        assert layer.weight.dtype == torch.float32
        assert isinstance(layer, nn.Linear)
        assert not type(layer).rankloom_original.__module__.startswith("bitsandbytes")
    assert torch.allclose(say(model), before, atol=1e-4)
    banks[0].unmerge()
    assert [type(m) for m in layers] == classes
    assert all(m.weight is w for m, w in zip(layers, weights))
    assert torch.equal(say(model), before)
    rl.detach(model)
    assert not any(isinstance(m, Grafted) for m in model.modules())
    assert torch.equal(say(model), bare)


@every_backend
def test_merge_into_the_store(backend):
    """The backend's own rounding, with what it lost; what the model says then is what the report says."""
    model = quantised(backend).train()
    bank = rl.attach(model, rl.LoRA(r=4), target_modules=TARGETS)
    nudge(bank)
    said = say(model).detach()
    layers = {f.name: f.layer for f in bank.sites("default")}
    old = {name: m.weight for name, m in layers.items()}
    wanted = {n: kind_of(m).weight(m) + bank.delta("default")[n] for n, m in layers.items()}
    classes = [type(m) for m in layers.values()]
    lost = bank.merge(into="store")
    assert lost.keys() == layers.keys()
    for name, layer in layers.items():
        assert type(layer.weight) is type(old[name])
        now = kind_of(layer).weight(layer)
        change = bank.delta("default")[name].norm()
        assert float((now - wanted[name]).norm() / change) == pytest.approx(lost[name], rel=1e-3)
        assert 0 < lost[name] < 3
    assert [type(m) for m in layers.values()] == classes
    assert 0 < (say(model) - said).norm() < 0.5 * said.norm()
    bank.unmerge()
    assert torch.equal(say(model), said)


@every_backend
def test_fold_is_for_good(backend):
    """Folded, the layers are plain, speak as before, and stay so after detach; the adapter starts anew on them."""
    model = quantised(backend).train()
    bank = rl.attach(model, rl.DoRA(rl.LoRA(r=4)), target_modules=TARGETS)
    nudge(bank)
    said = say(model).detach()
    bank.fold("default", into="dense")
    bank.reset("default")
    assert torch.allclose(say(model), said, atol=1e-4)
    rl.detach(model)
    assert torch.allclose(say(model), said, atol=1e-4)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert "model.layers.0.self_attn.q_proj.weight" in model.state_dict()


@every_backend
def test_folds_keep_weights_packed_and_are_folded_again(backend):
    """By default a fold rounds anew in the library's own form; the same base comes to the same numbers."""
    model, other = quantised(backend), quantised(backend)
    bank = rl.attach(model, rl.LoRA(r=4), target_modules=TARGETS)
    nudge(bank)
    base, change = dense_of(model), bank.delta("default")
    lost = bank.fold("default")
    assert lost.keys() == set(bank.adapted("default"))
    for name, weight in dense_of(model).items():
        assert bridge_of(model.get_submodule(name).weight) is not None
        off = (weight - base[name] - change[name]).norm() / change[name].norm()
        assert lost[name] == pytest.approx(float(off), rel=1e-3)
        assert off < 1
    twin = rl.attach(other, rl.LoRA(r=1), "b", target_modules=["down_proj"])
    twin.refold(bank.journal)
    for name, weight in dense_of(other, bank).items():
        assert torch.equal(weight, dense_of(model)[name])
        assert bridge_of(other.get_submodule(name).weight) is not None


def dense_of(model, bank=None):
    found = (bank or model.rankloom).adapted("default")
    return {name: kind_of(m).weight(m).clone() for name in found for m in [model.get_submodule(name)]}


def test_bf16_models_merge_into_bf16():
    """4- and 8-bit layers have no dtype of their own: what is merged has the model's."""
    for backend in (four(), eight):
        model = quantised(backend, torch.bfloat16)
        bank = rl.attach(model, rl.LoRA(r=4), target_modules=TARGETS)
        nudge(bank)
        said = say(model)
        assert said.dtype == torch.bfloat16
        assert {p.dtype for _, p, _ in bank.trainable()} == {torch.float32}
        bank.merge()
        assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
        assert (say(model) - said).float().norm() < 0.05 * said.float().norm()


def misreading(monkeypatch):
    """bitsandbytes as it is on CPUs with AVX512, on any CPU: rows that share blocks come out as others."""
    true = bnb.functional.dequantize_4bit

    def off(codes, state, *args, **kwargs):
        read = true(codes, state, *args, **kwargs)
        return read.flip(0) if state.shape[-1] % state.blocksize else read

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", off)


@pytest.mark.parametrize("width", [32, 48, 96, 160, 72])
@pytest.mark.parametrize("method", [METHODS["lora"], METHODS["dora"]], ids=["lora", "dora"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["this_cpu", "misread"])
def test_rows_of_broken_blocks_merge_exactly(width, method, everywhere, monkeypatch):
    """Rows that share blocks, which bitsandbytes misreads on some CPUs (made so on every one): products by the codes,
    gradients too, told once; `merge` says what the adapted model says; `detach` leaves bitsandbytes' own."""
    fourbit._misreads.cache_clear()
    if everywhere:
        misreading(monkeypatch)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.Tanh(), four()(nn.Linear(width, 64))).train()
    weight, bias = dense(model[2].weight), model[2].bias
    h, x = model[:2](torch.randn(5, 8)).detach(), torch.randn(5, 8)
    own = model[2](h)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        bank = rl.attach(model, method(), target_modules=["2"])
        bank.selector.fused = False
        for _ in range(2):
            assert torch.allclose(model[2](h), h @ weight.T + bias, atol=1e-4)
    wrong = everywhere or not torch.allclose(own, h @ weight.T + bias, atol=1e-4)
    assert len(told) == wrong
    assert not wrong or f"misreads nf4 rows of {width} on this CPU" in str(told[0].message)
    nudge(bank)
    said = model(x).detach()
    leaf = h.clone().requires_grad_()
    model[2](leaf).sum().backward()
    effective = weight + bank.delta("default")["2"]
    assert torch.allclose(leaf.grad, effective.sum(0).expand(5, -1), atol=1e-4)
    bank.merge()
    assert torch.allclose(model(x), said, atol=1e-4)
    bank.unmerge()
    assert torch.equal(model(x), said)
    rl.detach(model)
    assert type(model[2]) is bnb.nn.Linear4bit
    assert torch.equal(model[2](h), own)


@pytest.mark.parametrize("nested", [True, False])
def test_rearranged_weights_are_read_exactly(nested):
    """What an AVX512-BF16 CPU makes of a layer: the codes come back, with the scales as that layer then has them."""
    torch.manual_seed(0)
    layer = four(nested=nested)(nn.Linear(128, 64))
    straight = dense(layer.weight)
    codes = layer.weight.data.clone()
    scales = fourbit._scales(layer.weight.quant_state)
    convert = bnb.functional._convert_weight_packed_for_cpu
    layer.weight.data, layer.weight.quant_state = convert(layer.weight.data, layer.weight.quant_state)
    assert layer.weight.data.shape != codes.shape
    rounded = (straight.reshape(-1, 64) / scales[:, None] * scales.bfloat16().float()[:, None]).reshape(64, 128)
    assert torch.allclose(dense(layer.weight), rounded, rtol=1e-5)
    assert dense(layer.weight).dtype == torch.float32
    read = dense(layer.weight)
    kind_of(layer).normalise(layer)
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(dense(layer.weight), read)
    x = torch.randn(3, 128)
    assert torch.allclose(layer(x), x @ read.T + layer.bias, atol=1e-5)


def test_an_adapted_layer_is_never_rearranged(monkeypatch):
    """After an eval forward the base still trains, merges and is DoRA's exactly, and the flag comes back with detach."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    torch.manual_seed(0)
    model = nn.Sequential(four()(nn.Linear(128, 64)), nn.Tanh(), four()(nn.Linear(64, 64)))
    assert model[0].support_avx512bf16_for_cpu
    codes, x = model[2].weight.data.clone(), torch.randn(3, 128)
    bank = rl.attach(model, rl.DoRA(rl.LoRA(r=4)), target_modules=["0", "2"])
    nudge(bank)
    with torch.no_grad():
        before = model.eval()(x)
    assert torch.equal(model[2].weight.data, codes)
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p, _ in bank.trainable())
    bank.merge()
    assert torch.allclose(model(x), before, atol=1e-5)
    bank.unmerge()
    rl.detach(model)
    assert model[2].support_avx512bf16_for_cpu
    assert type(model[2]) is bnb.nn.Linear4bit


def test_eight_bit_reads_the_same_before_and_after_a_forward():
    """The first forward moves the scales into the layer; the layer is read all the same, the bare weight is refused."""
    layer = eight(nn.Linear(64, 48))
    before = kind_of(layer).weight(layer)
    assert torch.equal(dense(layer.weight), before)
    layer(torch.randn(2, 64))
    assert layer.weight.SCB is None
    assert torch.equal(kind_of(layer).weight(layer), before)
    with pytest.raises(StateError, match="moved them into its layer"):
        dense(layer.weight)
    kind_of(layer).normalise(layer)
    assert torch.equal(dense(layer.weight), before)
    assert layer(torch.randn(2, 64)).shape == (2, 48)


@pytest.mark.parametrize("shape", [(64, 128), (48, 96), (16, 12), (7, 33)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_four_bit_decoding(shape, quant_type, storage):
    """Codes and nested scales by hand, whatever the storage dtype; near the weight that was packed."""
    if storage != torch.uint8 and shape[0] * shape[1] % 4:
        pytest.skip("bitsandbytes cannot store this many bytes as bfloat16")
    w = torch.randn(shape)
    packed = bnb.nn.Params4bit(w.clone(), quant_type=quant_type, quant_storage=storage).to("cpu")
    read = dense(packed)
    assert read.shape == shape
    assert (read - w).abs().max() < 1.0
    state = packed.quant_state
    scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    data = packed.data.view(torch.uint8).flatten()
    codes = torch.stack((data >> 4, data & 15), -1).flatten()[: w.numel()].long()
    assert torch.equal(read.flatten(), state.code[codes] * scales.repeat_interleave(64)[: w.numel()])


def test_torchao_nf4():
    """The tensor of torchao's own QLoRA."""
    module = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layer = nn.Linear(64, 64)
    packed = module.to_nf4(layer.weight.detach(), 64, 1)
    assert torch.equal(dense(packed), packed.get_original_weight())
    again = bridge_of(packed).repack(packed, layer.weight)
    assert type(again) is type(packed)
    assert torch.equal(dense(again), dense(packed))


def test_other_plans_are_refused():
    """What would read or replace the bytes as numbers: a bare parameter, modules_to_save, packing again."""
    model = quantised(four())
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(TargetError, match="kept in few bits by bitsandbytes"):
        rl.attach(model, rl.LoRA(r=2), target_modules=(), target_parameters=[f"{name}.weight"])
    with pytest.raises(TargetError, match="kept in few bits by bitsandbytes"):
        rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj"], modules_to_save=["v_proj"])
    with pytest.raises(StateError, match="in few bits by bitsandbytes already"):
        keep(model, {f"{name}.weight": NormalFloat()})
    with pytest.raises(StateError, match="not packed yet"):
        dense(bnb.nn.Params4bit(torch.randn(4, 4)))


def test_copies_of_an_adapted_model():
    """A deep copy has its own weights and says the same."""
    model = quantised(four())
    bank = rl.attach(model, rl.LoRA(r=4), target_modules=TARGETS)
    nudge(bank)
    twin = copy.deepcopy(model)
    assert torch.equal(say(twin), say(model))
    twin.rankloom.merge()
    assert torch.allclose(say(twin), say(model), atol=1e-4)
    assert isinstance(model.model.layers[0].self_attn.q_proj, bnb.nn.Linear4bit)


@pytest.mark.parametrize("backend", [BACKENDS["bnb_nf4"], BACKENDS["bnb_int8"]], ids=["nf4", "int8"])
def test_unpickled_weights_find_their_class_again(backend):
    """torch pickles these parameters as plain bytes: read all the same, and merged into the store as before."""
    model = quantised(backend).train()
    bank = rl.attach(model, rl.DoRA(rl.LoRA(r=4)), target_modules=TARGETS)
    nudge(bank)
    said = say(model).detach()
    twin = pickle.loads(pickle.dumps(model))
    layer, original = twin.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.q_proj
    assert type(layer.weight) is nn.Parameter
    assert torch.allclose(say(twin), said, atol=1e-4)  # as bytes it takes the plain path, which rounds otherwise
    lost = twin.rankloom.merge(into="store")
    assert type(layer.weight) is type(original.weight)
    assert lost == pytest.approx(bank.merge(into="store"), rel=1e-4)
    assert torch.allclose(say(twin), say(model), atol=1e-4)
    twin.rankloom.unmerge()
    assert torch.allclose(say(twin), said, atol=1e-4)
