"""What a model lives through: merging, copying, casting, moving, saving, failing halfway."""

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
from core_tiny import (
    assert_untouched,
    difference,
    llama,
    nudge,
    snapshot,
    tokens,
    tower,
    words,
)  # fmt: skip
from core_tiny import (
    ids as tensor_ids,
)
from torch import nn

import rankloom as rl
from rankloom.core.adapter import Adapter
from rankloom.core.method import Method
from rankloom.errors import NotMergeable, StateError, TargetError

IDS = words()
PLAN = {"target_modules": ["q_proj", "v_proj", "embed"]}


def adapted(*names, method=None, model=None, **plan):
    model = tower() if model is None else model
    for i, name in enumerate(names):
        bank = rl.attach(model, method or rl.LoRA(r=2, lora_alpha=3), name, **(plan or PLAN))
        nudge(bank, name, seed=i)
    return model, bank


# merging ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_merging_several_with_weights_is_the_sum():
    model, bank = adapted("a", "b")
    base = {k: v.clone() for k, v in tower().state_dict().items()}
    changes = {n: bank.delta(n) for n in ("a", "b")}
    bank.use(a=0.7, b=-0.2)
    out = model(IDS)
    bank.merge()
    assert difference(model(IDS), out) < 1e-12
    for site in changes["a"]:
        total = 0.7 * changes["a"][site] - 0.2 * changes["b"][site]
        total = total.T if site == "embed" else total
        torch.testing.assert_close(model.get_submodule(site).weight, base[f"{site}.weight"] + total)
    bank.unmerge()
    bank.merge("a", b=0.5)
    assert bank.merged == ("a", "b")
    bank.unmerge()
    assert torch.equal(model(IDS), out)


@torch.no_grad()
def test_every_change_is_computed_before_any_is_written():
    """DoRA's matrix depends on the base: folding two must not let the second see the first."""
    model, bank = adapted("a", "b", method=rl.DoRA(rl.LoRA(r=2)), target_modules=["q_proj"])
    bank.use("a", "b")
    out = model(IDS)
    bank.merge()
    assert difference(model(IDS), out) < 1e-12


@torch.no_grad()
def test_fold_and_fold_back():
    model, bank = adapted("a")
    out = model(IDS)
    bank.fold("a")
    with bank.using():
        assert difference(model(IDS), out) < 1e-12
    bank.fold("a", sign=-1)
    assert difference(model(IDS), out) < 1e-12
    bank.fold("a")
    bank.reset("a")
    assert difference(model(IDS), out) < 1e-12


def test_what_cannot_be_merged_is_refused_before_anything_is_written():
    model = tower()
    rl.attach(model, rl.LoRA(r=2), "a", target_modules=["q_proj"])
    bank = rl.attach(model, rl.HydraLoRA(r=2, n_b=2), "b", target_modules=["v_proj"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kept = tensor_ids(model)
    for call in (bank.merge, bank.fold):
        with pytest.raises(NotMergeable, match="depends on its input"):
            call("a", "b")
    assert tensor_ids(model) == kept
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert bank.merged == ()


def test_detach_while_merged_restores_exactly():
    model = tower()
    before = snapshot(model)
    adapted("a", "b", model=model)
    model.rankloom.merge("a", "b")
    rl.detach(model)
    assert_untouched(model, before)


@torch.no_grad()
def test_removing_one_of_two():
    model, bank = adapted("a", "b")
    bank.use("b")
    out = model(IDS)
    bank.use("a", "b")
    rl.detach(model, "a")
    assert bank.names == ("b",)
    assert bank.active == {"b": 1.0}
    assert torch.equal(model(IDS), out)
    assert not any(".a." in key for key in model.state_dict())
    rl.detach(model, "b")
    with pytest.raises(StateError, match="has no adapters"):
        rl.detach(model)


@torch.no_grad()
def test_removing_one_while_the_other_is_merged():
    model, bank = adapted("a", "b")
    bank.use("a", "b")
    with bank.using("a"):
        out = model(IDS)
    bank.merge("a")
    rl.detach(model, "b")
    assert bank.merged == ("a",)
    assert difference(model(IDS), out) < 1e-12
    bank.unmerge()
    assert bank.active == {"a": 1.0}
    assert list(bank.trainable())


def test_flags_of_gradients_are_restored():
    model = tower()
    model.embed.weight.requires_grad_(False)
    model.layers[0].q_proj.bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    adapted("a", model=model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)
    adapted("b", model=model)
    model.rankloom.merge("a")
    rl.detach(model, "a")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)
    rl.detach(model, "b")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


# failing halfway ----------------------------------------------------------------------------------------------------


class Broken(Adapter):
    def __init__(self, site, at):
        super().__init__(site)
        self.at = at
        self.w = nn.Parameter(torch.zeros(1))

    def reset(self, base):
        if self.at:
            raise ArithmeticError("reset")


@dataclass(frozen=True)
class Breaks(Method):
    build_at: int = -1
    reset_at: int = -1
    patch_fails: bool = False

    def build(self, site):
        if site.index == self.build_at:
            raise ArithmeticError("build")
        return Broken(site, site.index == self.reset_at)

    def patch(self, model):
        if self.patch_fails:
            raise ArithmeticError("patch")
        return super().patch(model)


@pytest.mark.parametrize("method", [Breaks(build_at=2), Breaks(reset_at=2), Breaks(patch_fails=True)], ids=str)
@pytest.mark.parametrize("plan", [{}, {"layer_replication": [(0, 2), (0, 2)]}], ids=str)
def test_a_failing_attach_leaves_the_model_untouched(method, plan):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ArithmeticError):
        rl.attach(model, method, target_modules=["q_proj", "v_proj"], **plan)
    assert_untouched(model, before)
    assert model.config.num_hidden_layers == 2


@torch.no_grad()
@pytest.mark.parametrize("method", [Breaks(build_at=2), Breaks(reset_at=2)], ids=str)
def test_a_failing_second_attach_leaves_the_first_alone(method):
    model, bank = adapted("a")
    before, out = snapshot(model), model(IDS)
    with pytest.raises(ArithmeticError):
        rl.attach(model, method, "b", target_modules=["q_proj", "v_proj"])
    assert_untouched(model, before)
    assert bank.names == ("a",)
    assert torch.equal(model(IDS), out)


def test_a_method_that_leaves_every_site_alone_is_refused():
    @dataclass(frozen=True)
    class Nothing(Method):
        def build(self, site):
            return None

    model = tower()
    before = snapshot(model)
    with pytest.raises(TargetError, match="left every one of the 2 targets alone"):
        rl.attach(model, Nothing(), target_modules=["q_proj"])
    assert_untouched(model, before)


def test_a_layer_with_a_forward_of_its_own_is_refused_and_nothing_stays():
    model = tower()
    layer = model.layers[1].q_proj
    original = layer.forward
    layer.forward = lambda x: original(x) * 2
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"'layers.1.q_proj' \(Linear\) carries its own forward"):
        rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj"])
    assert_untouched(model, before)
    del layer.forward
    adapted("a", model=model)
    layer.forward = lambda x: x
    with pytest.raises(TargetError, match="carries its own forward"):
        rl.detach(model)
    assert model.rankloom.names == ("a",)
    del layer.forward
    rl.detach(model)


def test_a_layer_with_an_attribute_of_our_name_is_refused():
    model = tower()
    model.layers[1].q_proj.adapters = nn.ModuleDict()
    before = snapshot(model)
    with pytest.raises(TargetError, match="already has an attribute 'adapters'"):
        rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj"])
    assert_untouched(model, before)


# copies -------------------------------------------------------------------------------------------------------------

METHODS = [
    rl.LoRA(r=2),
    rl.DoRA(rl.LoRA(r=2)),
    rl.VeRA(r=3),
    rl.HydraLoRA(r=2, n_b=2),
    rl.LoRA(r=2, init_lora_weights="pissa"),
]
LINEAR = {"target_modules": ["q_proj", "v_proj"]}


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, through_torch])
def test_copies_are_equal_and_independent(method, duplicate):
    model, bank = adapted("a", "b", method=method, **LINEAR, trainable_token_indices=[1], modules_to_save=["head"])
    out = model(IDS)
    twin = duplicate(model)
    assert torch.equal(twin(IDS), out)
    assert twin.rankloom.model is twin
    assert twin.rankloom.switch is not bank.switch
    nudge(twin.rankloom, seed=9)
    twin.rankloom.use("b", a=0.3)
    assert torch.equal(model(IDS), out)
    changed = twin(IDS)
    assert difference(changed, out) > 1e-3
    with twin.rankloom.using():
        assert torch.equal(twin(IDS), tower()(IDS))
    assert torch.equal(twin(IDS), changed)
    rl.detach(twin)
    assert torch.equal(twin(IDS), tower()(IDS))
    assert {type(m) for m in twin.modules()} == {type(m) for m in tower().modules()}


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copied_layer_speaks_alone(duplicate):
    for method in METHODS:
        model, _ = adapted("a", method=method, **LINEAR)
        layer, x = model.layers[1].q_proj, torch.randn(2, 8, dtype=torch.float64)
        twin = duplicate(layer)
        assert torch.equal(twin(x), layer(x)), method
        assert isinstance(twin, nn.Linear)
        assert difference(twin(x), nn.functional.linear(x, layer.weight, layer.bias)) > 1e-3


def test_a_copy_of_a_merged_model_unmerges():
    model, bank = adapted("a")
    base = tower()(IDS)
    bank.merge()
    twin = copy.deepcopy(model)
    twin.rankloom.unmerge()
    with twin.rankloom.using():
        assert torch.equal(twin(IDS), base)
    assert bank.merged == ("a",)


@pytest.mark.parametrize("change", [lambda m: m.to(torch.float32), copy.deepcopy, pickled, lambda m: m.to("meta")])
def test_shared_tensors_stay_shared(change):
    model, _ = adapted("a", method=rl.VeRA(r=3), **LINEAR)
    changed = change(model)
    found = [adapter for _, adapter in changed.rankloom.adapters("a")]
    shared = changed.rankloom.shared_of("a")
    assert len(found) == 4
    assert all(a.A is shared.tensor("vera_A") and a.B is shared.tensor("vera_B") for a in found)
    assert sum(p is shared.tensor("vera_A") for p in changed.parameters()) == 1
    assert sum("vera_A" in key for key in changed.state_dict()) == 1
    assert found[0].A.dtype == changed.layers[0].q_proj.weight.dtype
    assert found[0].A.device == changed.layers[0].q_proj.weight.device
    assert not found[0].A.requires_grad


# dtypes and devices -------------------------------------------------------------------------------------------------


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
    if not isinstance(method, rl.HydraLoRA):
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


# files --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_base_checkpoint_loads_into_an_adapted_model():
    model, bank = adapted("a", model=llama(), target_modules="all-linear", modules_to_save=["lm_head"])
    other = llama(initializer_range=0.5)
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys
    assert all(".adapters." in key for key in result.missing_keys)
    with bank.using():
        assert torch.equal(model(tokens()).logits, other(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_of_an_adapted_model_loads_into_a_plain_one(tmp_path, merged, tied):
    from transformers import LlamaForCausalLM

    model, bank = adapted("a", model=llama(tie_word_embeddings=tied), method=rl.VeRA(r=3), target_modules="all-linear")
    with bank.using():
        expected = model(tokens()).logits
    if merged:
        expected = model(tokens()).logits
        bank.merge()
    model.save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    assert difference(plain(tokens()).logits, expected) < 1e-12


def test_the_keys_of_the_base_are_unchanged():
    keys = list(tower().state_dict())
    model, _ = adapted("a", **LINEAR, modules_to_save=["head"], trainable_token_indices=[1], bias="all")
    assert [key for key in model.state_dict() if ".adapters." not in key] == keys
    assert isinstance(model.layers[0].q_proj, nn.Linear)
    assert isinstance(model.head.weight, torch.Tensor)


# behaviour around the layers ----------------------------------------------------------------------------------------


def test_train_and_eval_reach_the_adapters():
    model = tower().eval()
    bank = rl.attach(model, rl.LoRA(r=2, lora_dropout=0.5), **PLAN)
    nudge(bank)
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


def test_hooks_on_an_adapted_layer_see_the_changed_output():
    model, bank = adapted("a")
    layer, seen = model.layers[0].q_proj, []
    layer.register_forward_hook(lambda m, a, y: seen.append((a[0], y)))
    with torch.no_grad():
        model(IDS)
    (x, y), delta = seen[0], bank.delta("a")["layers.0.q_proj"]
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight + delta, layer.bias))


def test_a_layer_called_by_keyword():
    model, _ = adapted("a")
    x = torch.randn(2, 8, dtype=torch.float64)
    layer = model.layers[0].q_proj
    assert torch.equal(layer(input=x), layer(x))


def test_the_print_out_shows_the_graft():
    model, bank = adapted("a")
    assert "GraftedLinear" in repr(model)
    assert "LoRAAdapter(r=2, scaling=1.5)" in repr(model)
    assert repr(bank) == "Bank(adapters=['a'], active=['a'], merged=[])"
