"""The fused path says what the plain path says, groups what reads one input, and steps aside where it does not fit."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from core_tiny import adapted, difference, llama, nudge, tokens, tower, words
from torch import nn

import rankloom as rl
from rankloom.core import fuse

IDS = tokens()
ALL = {"target_modules": "all-linear"}
METHODS = {
    "lora": rl.LoRA(r=2, lora_alpha=3),
    "rank_pattern": rl.LoRA(r=2),
    "dropout": rl.LoRA(r=2, lora_dropout=0.3),
    "frozen_A": rl.LoRA(r=2, frozen="A"),
    "asymmetric": rl.AsymmetricLoRA(r=2, lora_alpha=3),
    "dora": rl.DoRA(rl.LoRA(r=2)),
    "dora_magnitude": rl.DoRA(rl.LoRA(r=2), magnitude_only_modules=("q_proj", "down_proj")),
}


def memo(layer):
    return layer._rankloom.memo


def sites(model):
    return {name: layer for name, layer in model.named_modules() if "_rankloom" in vars(layer)}


def plain(model):
    """Why sites are not fused, by name."""
    return {name: memo(layer).plain for name, layer in sites(model).items() if memo(layer).plain}


def groups(model):
    found = {tuple(f._rankloom.name for f in memo(layer).fellows) for layer in sites(model).values()}
    return sorted(found - {()})


def gradients(model, bank, run, fused=True):
    bank.selector.fused = fused
    model.zero_grad()
    torch.manual_seed(5)
    loss = run(model)
    loss.backward()
    return loss.detach(), {key: p.grad.clone() for key, p, _ in bank.trainable() if p.grad is not None}


def assert_agree(model, bank, run, passes=3):
    """Loss and gradients of every pass are those of the plain path, and something was fused."""
    loss, expected = gradients(model, bank, run, fused=False)
    for _ in range(passes):
        found_loss, found = gradients(model, bank, run)
        torch.testing.assert_close(found_loss, loss, rtol=1e-12, atol=1e-12)
        assert found.keys() == expected.keys()
        for key, grad in expected.items():
            torch.testing.assert_close(found[key], grad, rtol=1e-9, atol=1e-13, msg=key)
    assert any(memo(layer).plain == "" for layer in sites(model).values())


def causal(model):
    return model(IDS, labels=IDS).loss


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_llama(method):
    model = llama(num_key_value_heads=1).train()
    pattern = {"rank_pattern": {"v_proj": 5, "up_proj": 1}} if method is METHODS["rank_pattern"] else {}
    bank = rl.attach(model, method, **ALL, **pattern)
    nudge(bank)
    assert_agree(model, bank, causal)
    assert plain(model) == {}
    assert [[n.rsplit(".", 1)[-1] for n in g] for g in groups(model)] == 2 * [
        ["gate_proj", "up_proj"],
        ["q_proj", "k_proj", "v_proj"],
    ]


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )


def qwen():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SMALL))


def mistral():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SMALL))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
        )
    )


SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
FAMILIES = {"gpt2": (gpt2, 1), "bert": (bert, 3), "qwen2": (qwen, 3), "mistral": (mistral, 3), "vit": (vit, 3)}


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, method):
    make, widest = FAMILIES[family]
    torch.manual_seed(0)
    model = make().double().train()
    bank = rl.attach(model, METHODS[method], **ALL)
    nudge(bank)
    pixels = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(m):
        return m(pixels).logits.square().sum() if family == "vit" else m(IDS, labels=IDS).loss

    assert_agree(model, bank, run)
    assert plain(model) == {}
    assert max((len(g) for g in groups(model)), default=1) == widest


def test_a_swiglu_lets_the_output_of_its_activation_go():
    """down_proj is linked to gate and up, past the product: neither SiLU's output nor the product is kept."""
    from rankloom.ops.kept import kept_bytes

    model = llama(depth=1).train()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["gate_proj", "up_proj", "down_proj"])
    sizes = {}
    for fused in (False, True):
        bank.selector.fused = fused
        causal(model)
        sizes[fused] = kept_bytes([causal(model)], model.parameters())
    copies = sum(p.numel() * p.element_size() for _, p, _ in bank.trainable())  # of the factors, for the products
    assert abs(sizes[False] - sizes[True] - 2 * 8 * IDS.numel() * 24) < copies < 8 * IDS.numel() * 24


NORMS = {
    "affine": lambda width: nn.LayerNorm(width),
    "no_bias": lambda width: nn.LayerNorm(width, bias=False),
    "bare": lambda width: nn.LayerNorm(width, elementwise_affine=False),
    "two_dims": lambda width: nn.LayerNorm((5, width)),
    "rms": lambda width: nn.RMSNorm(width),
}


class Normed(nn.Module):
    """A norm before a linear layer, its output also as one side of a gated product."""

    def __init__(self, norm, dtype):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), norm(8)
        self.proj, self.gate, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        for p in self.norm.parameters():
            nn.init.normal_(p, mean=1.0)
        self.to(dtype)

    def forward(self, x):
        y = self.norm(3 * self.first(x).sin() + 1)
        return self.out(torch.nn.functional.silu(self.gate(y)) * self.norm(self.proj(y)))


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_the_output_of_a_norm_is_rebuilt(norm):
    """Neither norm's output is kept; gradients of first and second order are the plain path's."""
    from rankloom.ops.kept import kept_bytes

    torch.manual_seed(0)
    model = Normed(norm, torch.float64).train()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["first", "proj", "gate", "out"])
    nudge(bank)
    x = torch.randn(7, 5, 4, dtype=torch.float64)
    assert_agree(model, bank, lambda m: m(x).sin().sum())
    sizes, curvatures = {}, {}
    for fused in (False, True):
        bank.selector.fused = fused
        sizes[fused] = kept_bytes([model(x)], [*model.parameters(), x])
        parameters = [p for _, p, _ in bank.trainable()]
        first = torch.autograd.grad(model(x).sin().sum(), parameters, create_graph=True)
        curvatures[fused] = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
    for found, expected in zip(curvatures[True], curvatures[False]):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    copies = sum(p.numel() * p.element_size() for _, p, _ in bank.trainable())
    assert sizes[False] - sizes[True] >= 3 * 8 * 7 * 5 * 8 - copies  # norm, SiLU, and what `out` reads


def test_a_norm_that_keeps_sixteen_bits_is_not_rebuilt_from_them():
    from rankloom.ops.rebuild import origin

    x = torch.randn(5, 8, requires_grad=True)
    wide, narrow = nn.LayerNorm(8), nn.LayerNorm(8, dtype=torch.bfloat16)
    found = origin(wide(x.bfloat16()), shortcut=False)
    assert torch.equal(found.make(found.kept), wide(x.bfloat16()))
    assert origin(narrow(x.bfloat16()), shortcut=False) is None
    assert origin(torch.nn.functional.layer_norm(x, (8,), None, torch.ones(8)), shortcut=False) is None


@pytest.mark.parametrize("hold", ["retain_grad", "hook", "captured"])
def test_a_tensor_that_others_watch_is_not_passed_by(hold):
    """Whoever holds the activation's output, or listens at down_proj, gets its gradient as on the plain path."""
    model = llama(depth=1).train()
    bank = rl.attach(model, rl.LoRA(r=2), **ALL)
    nudge(bank)
    seen = []
    mlp = model.model.layers[0].mlp

    def keep(_module, args, *_):
        args[0].retain_grad()
        seen.append(args[0])

    if hold == "retain_grad":
        mlp.down_proj.register_forward_pre_hook(keep)
    elif hold == "hook":
        mlp.down_proj.register_forward_hook(keep)
    else:
        mlp.act_fn.register_forward_hook(lambda _m, _x, y: (y.retain_grad(), seen.append(y))[0])
    gradients(model, bank, causal, fused=False)
    gradients(model, bank, causal)
    gradients(model, bank, causal)
    expected, *others = [t.grad for t in seen]
    for grad in others:
        torch.testing.assert_close(grad, expected)


def test_weights_fold_into_the_scale_and_other_selections_take_the_plain_path():
    model = llama().train()
    bank = rl.attach(model, rl.LoRA(r=2), "a", **ALL)
    rl.attach(model, rl.LoRA(r=3), "b", **ALL)
    nudge(bank)
    rows = torch.tensor([1, 0])
    for select, fits in (
        ({"a": 0.7}, True),
        ({"b": -2.0}, True),
        ({"a": 0.5, "b": 2.0}, True),
        ({"a": torch.tensor(0.5)}, False),
        ({"a": torch.tensor([0.5, 1.0])}, False),
        ({"rows": ["a", "b"]}, False),
    ):
        with bank.using(**select):
            _, expected = gradients(model, bank, causal, fused=False)
            for _ in range(2):
                _, found = gradients(model, bank, causal)
                for key, grad in expected.items():
                    torch.testing.assert_close(found[key], grad)
        assert (plain(model) == {}) == fits, select
    with bank.using("a", "b", rows=rows):
        causal(model).backward()


def test_switching_between_the_members_of_a_group():
    """An output that waits is only for the selection, and the input, that it was computed for."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(4, 3, dtype=torch.float64), nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, x, between=lambda: None, other=None):
            q = self.q_proj(x)
            between()
            return q + self.v_proj(x if other is None else other)

    model = Pair()
    for seed, name in enumerate(("a", "b")):
        bank = rl.attach(model, rl.LoRA(r=2), name, target_modules=["q_proj", "v_proj"])
        nudge(bank, name, seed=seed)
    x, other = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    for _ in range(2):
        model(x.clone())
    assert groups(model) == [("q_proj", "v_proj")]
    bank.selector.fused = False
    mixed = model(x, lambda: bank.use("b"))
    bank.use("a")
    shifted = model(x, other=other)
    changed = model(x.clone(), other=x + 1)
    bank.selector.fused = True
    torch.testing.assert_close(model(x, lambda: bank.use("b")), mixed)
    bank.use("a")
    torch.testing.assert_close(model(x, other=other), shifted)
    model = copy.deepcopy(model)
    for _ in range(2):
        model(x.clone())
    y = x.clone()
    torch.testing.assert_close(model(y, lambda: y.add_(1)), changed)


def test_a_group_that_misses_dissolves():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.v_proj = nn.Linear(4, 3), nn.Linear(4, 3)
            self.both = True

        def forward(self, x):
            q = self.q_proj(x)
            return q + self.v_proj(x) if self.both else q

    model = Pair()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj", "v_proj"])
    nudge(bank)
    for _ in range(2):
        model(torch.randn(2, 4))
    assert len(groups(model)) == 1
    model.both = False
    for _ in range(2):
        model(torch.randn(2, 4)).sum().backward()
    assert groups(model) == []
    model.both = True
    for _ in range(3):
        model(torch.randn(2, 4))
    assert groups(model) == []


def test_nothing_waits_after_a_pass():
    model = llama().train()
    bank = rl.attach(model, rl.LoRA(r=2), **ALL)
    for _ in range(2):
        causal(model).backward()
    assert fuse._here.reader.parked == {}
    assert fuse._here.reader.held is None
    watched = []
    model.model.layers[0].register_forward_pre_hook(lambda _m, args: watched.append(weakref.ref(args[0])))
    causal(model)
    gc.collect()
    assert watched
    assert all(ref() is None for ref in watched)
    assert bank.names


def test_backward_lets_go_of_what_was_kept_though_the_loss_lives():
    model = llama(depth=1).train()
    rl.attach(model, rl.LoRA(r=2), **ALL)
    causal(model).backward()
    kept = []
    mlp = model.model.layers[0].mlp
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.register_forward_hook(lambda _m, _x, y: kept.append(weakref.ref(y)))
    loss = causal(model)
    loss.backward()
    gc.collect()
    assert kept
    assert all(ref() is None for ref in kept)
    assert loss.grad_fn is not None


LAYOUTS = {
    "transposed": lambda: torch.randn(7, 4, 6).transpose(0, 1),
    "every_other": lambda: torch.randn(7, 4, 6)[:, ::2],
    "repeated": lambda: torch.randn(1, 4, 6).expand(3, 4, 6),
    "last_dim_apart": lambda: torch.randn(6, 7, 4).permute(1, 2, 0),
    "four_dims": lambda: torch.randn(7, 4, 6, 3).permute(3, 0, 1, 2),
    "rows": lambda: torch.randn(6, 4).t(),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("bias", [False, True])
def test_inputs_of_any_layout(layout, method, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias, dtype=torch.float64)).train()
    bank = rl.attach(model, METHODS[method], target_modules=["0"])
    nudge(bank)
    x, found = layout().double(), {}
    for fused in (False, True):
        bank.selector.fused, into = fused, x.detach().requires_grad_()
        loss = model(into).sin().sum()
        parameters = [p for _, p, _ in bank.trainable()]
        found[fused] = [loss.detach(), *torch.autograd.grad(loss, [into, *parameters])]
    assert memo(model[0]).plain == ""
    for one, other in zip(*found.values()):
        torch.testing.assert_close(one, other)


def test_a_model_that_is_gone_is_gone():
    model = llama().train()
    rl.attach(model, rl.LoRA(r=2), **ALL)
    for _ in range(2):
        causal(model).backward()
    gone = [weakref.ref(layer) for layer in sites(model).values()]
    del model
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_an_exception_between_two_members_leaves_the_next_pass_right():
    model = llama().train()
    bank = rl.attach(model, rl.LoRA(r=2), **ALL)
    nudge(bank)
    _, expected = gradients(model, bank, causal, fused=False)
    for _ in range(2):
        gradients(model, bank, causal)

    def fail(*_):
        raise ZeroDivisionError

    handle = model.model.layers[0].self_attn.k_proj.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        causal(model)
    handle.remove()
    for _ in range(3):
        _, found = gradients(model, bank, causal)
        for key, grad in expected.items():
            torch.testing.assert_close(found[key], grad)


def test_copies_and_pickles_learn_their_own_groups():
    model = llama().train()
    bank = rl.attach(model, rl.LoRA(r=2), **ALL)
    nudge(bank)
    for _ in range(2):
        loss = causal(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert groups(other) == []
        torch.testing.assert_close(causal(other), loss)
        other.rankloom.reset("default")
        for _ in range(2):
            silent = causal(other)
        assert groups(other) == groups(model)
        assert all(f in other.modules() for layer in sites(other).values() for f in memo(layer).fellows)
        assert not torch.equal(silent, loss)


def test_hooks_of_members_run():
    model = llama().train()
    bank = rl.attach(model, rl.LoRA(r=2), **ALL)
    nudge(bank)
    k_proj = model.model.layers[0].self_attn.k_proj
    for _ in range(2):
        before = causal(model)
    k_proj.register_forward_hook(lambda _m, _x, y: 2 * y)
    bank.selector.fused = False
    expected = causal(model)
    bank.selector.fused = True
    torch.testing.assert_close(causal(model), expected)
    assert difference(expected, before) > 1e-6


def test_the_first_layer_needs_no_gradient_of_its_input_and_a_frozen_A_no_input():
    layer = nn.Sequential(nn.Linear(40, 8))
    bank = rl.attach(layer, rl.LoRA(r=2, frozen="A"), target_modules=["0"])
    x = torch.randn(16, 40)
    kept = layer(x).grad_fn.saved_tensors
    assert {tuple(t.shape) for t in kept if t is not None} == {(16, 2), (8, 40), (2, 40), (8, 2)}
    assert next(bank.adapters())[1].A.grad is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("zero", [(), (1,), (0, 1, 2)])
def test_magnitude_zero(zero, bias):
    """Where m = 0 the output is as good as zero, and the magnitude has its gradient, of first and second order."""
    model = nn.Sequential(nn.Linear(5, 3, bias, dtype=torch.float64))
    bank = rl.attach(model, rl.DoRA(rl.LoRA(r=2)), target_modules=["0"])
    nudge(bank)
    adapter = next(bank.adapters())[1]
    adapter.magnitude.data[list(zero)] = 0.0
    x = torch.randn(4, 5, dtype=torch.float64)
    assert_agree(model, bank, lambda m: m(x).sin().sum())
    curvatures = []
    for fused in (False, True):
        bank.selector.fused = fused
        (first,) = torch.autograd.grad(model(x).sin().sum(), adapter.magnitude, create_graph=True)
        curvatures.append(torch.autograd.grad(first.square().sum(), adapter.magnitude)[0])
    torch.testing.assert_close(*curvatures)


def test_the_norm_of_a_changed_base_is_computed_again():
    model = nn.Sequential(nn.Linear(5, 3, dtype=torch.float64))
    bank = rl.attach(model, rl.DoRA(rl.LoRA(r=2)), target_modules=["0"])
    nudge(bank)
    x = torch.randn(4, 5, dtype=torch.float64)

    def run(m):
        return m(x).sin().sum()

    assert_agree(model, bank, run)
    with torch.no_grad():
        model[0]._parameters["weight"].mul_(3)
    assert_agree(model, bank, run)
    model[0]._parameters["weight"] = nn.Parameter(torch.randn(3, 5, dtype=torch.float64), requires_grad=False)
    assert_agree(model, bank, run)
    bank.fold("default")
    assert_agree(model, bank, run)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_derivatives_of_higher_order(method):
    model = llama(depth=1).train()
    bank = rl.attach(model, METHODS[method], **ALL)
    nudge(bank)
    parameters = [p for _, p, _ in bank.trainable()]

    def curvature(fused):
        bank.selector.fused = fused
        causal(model)
        first = torch.autograd.grad(causal(model), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)

    for found, expected in zip(curvature(True), curvature(False)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)  # Llama's norms are float32


def test_a_frozen_A_refuses_derivatives_of_higher_order_in_words():
    model = nn.Sequential(nn.Linear(4, 3))
    bank = rl.attach(model, rl.LoRA(r=2, frozen="A"), target_modules=["0"])
    with pytest.raises(RuntimeError, match="fused = False"):
        torch.autograd.grad(model(torch.randn(2, 4)).sum(), next(bank.adapters())[1].B, create_graph=True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "dropout"])
def test_half_precision_is_as_near_to_the_truth_as_the_plain_path(method, autocast):
    def found(dtype, fused, half=False):
        model = llama().to(dtype).train()
        bank = rl.attach(model, METHODS[method], **ALL)
        generator = torch.Generator().manual_seed(0)
        for _, p, role in bank.trainable():
            noise = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.data.copy_(noise + (role == "magnitude"))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            for _ in range(2):
                grads = gradients(model, bank, causal, fused)[1]
        assert not fused or plain(model) == {}
        return {key: grad.double() for key, grad in grads.items()}

    truth = found(torch.float64, True)
    setting = (torch.float32, True) if autocast else (torch.bfloat16, False)
    fused, unfused = (found(setting[0], f, setting[1]) for f in (True, False))
    error = {
        name: sum(float((g[k] - truth[k]).square().sum()) for k in truth) for name, g in (("f", fused), ("p", unfused))
    }
    assert error["f"] < 2 * error["p"]
    assert error["f"] < 0.02 * sum(float(g.square().sum()) for g in truth.values())


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_stay_packed(bits):
    from rankloom.store.base import Packed
    from rankloom.store.model import keep
    from rankloom.store.uniform import Uniform

    model = llama().float().train()
    keep(model, {name: Uniform(bits, 8) for name, p in model.named_parameters() if "_proj" in name})
    bank = rl.attach(model, rl.DoRA(rl.LoRA(r=2)), target_modules=["q_proj", "v_proj", "down_proj"])
    nudge(bank)
    _, expected = gradients(model, bank, causal, fused=False)
    for _ in range(2):
        _, found = gradients(model, bank, causal)
    assert plain(model) == {}
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-3, atol=1e-5)
    weight = model.model.layers[0].self_attn.q_proj._parameters["weight"]
    assert isinstance(weight, Packed)
    model.cpu()  # as a move to another device: what has been learnt of a weight does not hold it fast
    with torch.no_grad():
        weight.copy_(2 * weight.unpack())
    _, expected = gradients(model, bank, causal, fused=False)
    _, found = gradients(model, bank, causal)
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("has_thin", [False, True])
def test_a_subclass_with_another_change_is_the_same_fused_and_plain(has_thin):
    from rankloom.methods.lora import LoRAAdapter

    class Thrice(LoRAAdapter):
        def thin(self, base, x):
            thin = super().thin(base, x)
            return thin._replace(scale=3 * thin.scale)

    class Apart(LoRAAdapter):
        def thin(self, base, x):
            return None

        def forward(self, x, y, base):
            return 3 * base.up(base.down(x, self.A), self.scaling * self.B)

    model, bank = adapted("a", model=tower().train())
    before = model(words())
    for _, adapter in bank.adapters("a"):
        adapter.__class__ = Thrice if has_thin else Apart
    fused = model(words())
    bank.selector.fused = False
    torch.testing.assert_close(model(words()), fused)
    assert difference(fused, before) > 1e-3


@pytest.mark.parametrize("name", ["forward", "delta", "delta_bias", "row_norms"])
def test_a_subclass_that_hides_its_change_behind_a_thin_form_is_refused(name):
    """The thin form is what fusing, merging and export read: who has another change has to say so."""
    from rankloom.methods.lora import LoRAAdapter

    with pytest.raises(TypeError, match=f"Hidden has a '{name}' of its own and inherits a thin form"):
        type("Hidden", (LoRAAdapter,), {name: lambda *args: None})
    type("Told", (LoRAAdapter,), {name: lambda *args: None, "thin": lambda self, base, x: None})


def test_what_is_not_fused_says_why():
    for method, said in (
        (rl.DoRA(rl.LoRA(r=2), detach_norm=False), "DoRAAdapter: its norm has a gradient"),
        (rl.QALoRA(r=2, group_size=4, lora_dropout=0.5), "QALoRAAdapter: its dropout acts on pooled columns"),
        (rl.LoRA(r=2, init_lora_weights="pissa", lora_dropout=0.5), "ResidualAdapter: the change drops out"),
    ):
        model = tower().train()
        rl.attach(model, method, target_modules=["q_proj"])
        model(words())
        assert plain(model)
        assert all(why.startswith(said) for why in plain(model).values()), plain(model)


MORE = {
    "lora_bias": [rl.LoRA(r=2, lora_bias=True)],
    "lora_bias_dropout": [rl.LoRA(r=2, lora_bias=True, lora_dropout=0.3)],
    "vera": [rl.VeRA(r=3)],
    "vera_dropout": [rl.VeRA(r=3, vera_dropout=0.3)],
    "adalora": [rl.AdaLoRA(init_r=3, target_r=2)],
    "dylora": [rl.DyLoRA(r=4)],
    "hydralora": [rl.hydralora(r=2, n_b=3)],
    "hydralora_dropout": [rl.hydralora(r=2, n_b=3, lora_dropout=0.3)],
    "qalora": [rl.QALoRA(r=2, group_size=4)],
    "pissa": [rl.LoRA(r=2, init_lora_weights="pissa")],
    "dora_dropout": [rl.DoRA(rl.LoRA(r=2, lora_dropout=0.3))],
    "dora_bias": [rl.DoRA(rl.LoRA(r=2, lora_bias=True, lora_dropout=0.3))],
    "dora_of_vera": [rl.DoRA(rl.VeRA(r=3))],
    "dora_of_adalora": [rl.DoRA(rl.AdaLoRA(init_r=3, target_r=2))],
    "two": [rl.LoRA(r=2), rl.LoRA(r=3)],
    "two_of_which_one_drops": [rl.LoRA(r=2), rl.LoRA(r=3, lora_dropout=0.3)],
    "dora_and_lora": [rl.DoRA(rl.LoRA(r=2)), rl.LoRA(r=3, lora_bias=True)],
    "two_doras": [rl.DoRA(rl.LoRA(r=2, lora_dropout=0.3)), rl.DoRA(rl.LoRA(r=3))],
    "three": [rl.DoRA(rl.LoRA(r=2)), rl.hydralora(r=2, n_b=2, lora_dropout=0.2), rl.VeRA(r=3)],
}


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.5, -2.0, 0.75)])
@pytest.mark.parametrize("bias", ["none", "lora_only"])
@pytest.mark.parametrize("methods", MORE.values(), ids=MORE)
def test_the_whole_thin_form(methods, bias, weights):
    """Outputs and gradients of any options and of several adapters, of first order and once of second."""
    torch.manual_seed(0)
    model = tower().double().train()
    trained = [bias, "none", "none"]
    for i, method in enumerate(methods):
        bank = rl.attach(model, method, f"n{i}", target_modules=["q_proj", "v_proj"], bias=trained[i])
    nudge(bank)
    ids = words()
    with bank.using(**{f"n{i}": weights[i] for i in range(len(methods))}):
        assert_agree(model, bank, lambda m: m(ids).sin().sum(), passes=2)
        assert plain(model) == {}
        assert_second_order(model, bank, ids)


def assert_second_order(model, bank, ids):
    """Where all A are frozen the input is let go, and that is said; routers are float32."""
    parameters = [p for _, p, _ in bank.trainable()]
    factors = [p for name in bank.names for _, p, role in bank.tensors(name) if role in ("in", "basis")]
    frozen = not any(p.requires_grad for p in factors)
    found = []
    for fused in (False, True):
        bank.selector.fused = fused
        torch.manual_seed(3)
        ys = model(ids).sin().sum()
        if fused and frozen:
            with pytest.raises(RuntimeError, match="fused = False"):
                torch.autograd.grad(ys, parameters, create_graph=True, allow_unused=True)
            return
        first = torch.autograd.grad(ys, parameters, create_graph=True, allow_unused=True)
        norm = sum(g.square().sum() for g in first if g is not None)
        found.append(torch.autograd.grad(norm, parameters, allow_unused=True))
    for one, other in zip(*found):
        if one is not None and other is not None:
            size = one.abs().max().clamp_min(1e-3)
            torch.testing.assert_close(other / size, one / size, rtol=1e-5, atol=1e-5)
        else:
            assert all(g is None or not g.any() for g in (one, other))
