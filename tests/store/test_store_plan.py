"""A plan chooses the store of its base and a start that fills the adapters from what the store loses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankloom as rl
from rankloom import presets
from rankloom.core.plan import Plan, default_plan, plan_data, plan_from_data
from rankloom.errors import FileError, SettingsError, StateError, TargetError
from rankloom.starts.gptq import GPTQ
from rankloom.starts.split import LQ, LoftQ
from rankloom.store import dense
from rankloom.store.base import Packed
from rankloom.store.mixed import MixedBits
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform

SPLITS = {
    "loftq": presets.loftq(bits=2, r=8),
    "lqer": presets.lqer(bits=2, r=8),
    "lq_lora": presets.lq_lora(bits=3.0, r=8),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)
        self.head = nn.Linear(64, 7)
        with torch.no_grad():  # weights of trained models are not noise: a few directions matter more than others
            for layer in (self.up, self.down):
                layer.weight.add_(torch.randn(layer.out_features, 4) @ torch.randn(4, layer.in_features) / 20)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x, labels=None):
        y = self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))
        return y if labels is None else Loss(nn.functional.cross_entropy(y, labels))


class Loss:
    def __init__(self, loss):
        self.loss = loss


def net():
    torch.manual_seed(0)
    return Net().eval()


def batches(n=3):
    g = torch.Generator().manual_seed(1)
    spread = torch.logspace(-1, 1, 64)
    return [
        {"x": torch.randn(4, 64, generator=g) * spread, "labels": torch.randint(7, (4,), generator=g)} for _ in range(n)
    ]


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def test_qlora_packs_all_linear_layers_but_the_head_wherever_the_adapters_are():
    model = net()
    dense_up = model.up.weight.detach().clone()
    bank = rl.attach(model, presets.qlora(r=4), target_modules=["down"])
    assert isinstance(model.up.weight, Packed)
    assert isinstance(model.down.weight, Packed)
    assert not isinstance(model.head.weight, Packed)
    assert torch.equal(dense(model.up.weight), NormalFloat().round_trip(dense_up))
    assert [name for name, _ in bank.adapters("default")] == ["down"]
    rl.detach(model)
    assert isinstance(model.up.weight, Packed)
    assert not model.up.weight.requires_grad
    assert model.head.weight.requires_grad
    assert type(model.down) is nn.Linear


def test_skipped_modules_stay_dense_and_a_wrong_name_is_refused():
    model = net()
    rl.attach(model, presets.qlora(r=4), store_skip_modules=["up"])
    assert not isinstance(model.up.weight, Packed)
    assert isinstance(model.down.weight, Packed)
    with pytest.raises(TargetError, match=r"store_skip_modules: 'upp' matches nothing in the model; did you mean 'up'"):
        rl.attach(net(), presets.qlora(r=4), store_skip_modules=["upp"])


def test_a_store_that_does_not_fit_is_refused_before_anything_is_packed():
    model = net()
    with pytest.raises(SettingsError, match=r"layer 'up'.*64 columns.*groups of 48.*store_skip_modules"):
        rl.attach(model, Plan(rl.LoRA(r=4), store=Uniform(4, 48)))
    assert not hasattr(model, "rankloom")
    assert not any(isinstance(p, Packed) for p in model.parameters())


def test_a_second_adapter_shares_the_packed_base_and_another_store_is_refused():
    model = net()
    rl.attach(model, presets.qlora(r=4), name="a")
    weight = model.up.weight
    rl.attach(model, presets.qlora(r=2), name="b")
    assert model.up.weight is weight
    with pytest.raises(StateError, match=r"'up' is kept as NormalFloat.*the plan says Uniform"):
        rl.attach(model, Plan(rl.LoRA(r=2), store=Uniform()), name="c")
    assert list(model.rankloom.plans) == ["a", "b"]


def test_magnitudes_of_dora_start_from_the_packed_weights():
    model, x = net(), torch.randn(5, 64)
    bank = rl.attach(model, Plan(rl.DoRA(rl.LoRA(r=4)), store=NormalFloat(2)))
    with bank.using():
        base = model(x)
    assert torch.allclose(model(x), base, atol=1e-6)


@pytest.mark.parametrize("plan", SPLITS.values(), ids=SPLITS)
def test_a_start_is_nearer_to_the_dense_model_than_packing_alone(plan):
    x = torch.randn(16, 64)
    want, plain, model = net()(x), net(), net()
    rl.attach(plain, Plan(rl.LoRA(r=8), store=plan.store))
    bank = rl.attach(model, plan)
    assert relative(model(x), want) < 0.9 * relative(plain(x), want)
    for site, started in bank.started["default"].items():
        adapter = dict(bank.adapters("default"))[site]
        w = net().get_submodule(site).weight
        left = w - dense(model.get_submodule(site).weight) - adapter.scaling * adapter.B @ adapter.A
        assert float(left.detach().norm()) == pytest.approx(started.errors[started.best], rel=1e-3)
    assert bank.started["default"].keys() == {"up", "down"}


def test_a_start_divides_by_the_scale():
    """Pitfall of the released code: right only where alpha = r."""
    x = torch.randn(16, 64)
    models = []
    for alpha in (8.0, 32.0):
        model = net()
        rl.attach(model, presets.loftq(bits=2, r=8, lora_alpha=alpha))
        models.append(model)
    assert torch.allclose(models[0](x), models[1](x), atol=1e-4)


def test_starts_that_look_at_data_ask_for_it_and_use_it():
    with pytest.raises(SettingsError, match=r"looks at data: attach\(…, calibration="):
        rl.attach(net(), presets.lqer(bits=2, r=4, activations=True))
    data = batches()
    want, errors = net()(data[0]["x"]), {}
    for activations in (False, True):
        model = net()
        rl.attach(model, presets.lqer(bits=2, r=4, activations=activations), calibration=data)
        errors[activations] = relative(model(data[0]["x"]), want)
    assert errors[True] < errors[False]


def test_fisher_information_weighs_both_the_widths_and_the_split():
    """A layer whose output hardly matters gets fewer bits than it gets without Fisher information."""
    stores = {}
    for fisher in (False, True):
        model = net()
        with torch.no_grad():
            model.down.weight.mul_(1e-3)
        plan = Plan(rl.LoRA(r=2), store=MixedBits(3.2), start=LQ(fisher))
        rl.attach(model, plan, calibration=batches())
        stores[fisher] = {n: getattr(model, n).weight.store.bits for n in ("up", "down")}
        total = sum(getattr(model, n).weight.stored_bytes for n in ("up", "down")) * 8 / (2 * 64 * 96)
        assert total <= 3.25
    assert stores[False]["up"] > stores[False]["down"]
    assert stores[True]["down"] > stores[False]["down"]


def test_gptq_rounds_for_the_inputs_and_leaves_the_adapter_alone():
    data, error = batches(), {}
    want = net()(data[0]["x"])
    for start in (None, GPTQ()):
        model = net()
        plan = Plan(rl.QALoRA(r=2, group_size=32), store=Uniform(2, 32), start=start)
        bank = rl.attach(model, plan, calibration=data)
        error[start] = relative(model(data[0]["x"]), want)
        assert not dict(bank.adapters("default"))["up"].B.any()
    assert error[GPTQ()] < error[None]
    assert all(s.errors[1] < s.errors[0] for s in bank.started["default"].values())
    with pytest.raises(SettingsError, match="start=gptq rounds affine codes"):
        rl.attach(net(), Plan(rl.LoRA(r=2), store=NormalFloat(), start=GPTQ()), calibration=data)


@pytest.mark.parametrize("name", ["qlora", "qdylora", "loftq", "lqer", "lq_lora"])
def test_presets_survive_json_and_are_resolved_by_name(name):
    plan = default_plan(name, r=4)
    assert plan_from_data(plan_data(plan)) == plan
    assert plan_from_data({"method": {"name": name, "r": 4}}) == plan
    bits = {"lq_lora": 2.5}.get(name, 2)
    changed = plan_from_data({"method": name, "store": {**plan_data(plan)["store"], "bits": bits}})
    assert changed.store.bits == bits
    assert changed.start == plan.start


def test_qdylora_is_dylora_on_normal_float():
    plan = presets.qdylora(bits=3, r=8)
    assert type(plan.method) is rl.DyLoRA
    assert plan.store == NormalFloat(3)


def test_a_start_needs_a_store_and_lora_on_linear_layers():
    with pytest.raises(SettingsError, match="start=LoftQ.*without a store"):
        Plan(rl.LoRA(), start=LoftQ())
    model = net()
    with pytest.raises(TargetError, match="a base is split for LoRA on linear layers"):
        rl.attach(model, Plan(rl.DoRA(), store=NormalFloat(), start=LoftQ()))
    assert not hasattr(model, "rankloom")
    assert not any(isinstance(p, Packed) for p in model.parameters())


def test_the_gap_to_the_optimum_is_reported():
    from rankloom.store.mixed import mix

    model = net()
    weights = {n: getattr(model, n).weight for n in ("up", "down")}
    found = mix(weights, 3.0, MixedBits(3.0).stores(), solver="milp")
    fast = mix(weights, 3.0, MixedBits(3.0).stores())
    assert found.allocation.gap < 1e-6
    assert fast.allocation.cost >= found.allocation.cost * (1 - 1e-9)
    assert fast.bits <= 3.0


# ---- files ----------------------------------------------------------------------------------------------------------


def _nudged(plan, **settings):
    model = net()
    bank = rl.attach(model, plan, **settings)
    with torch.no_grad():
        for _, parameter, _ in bank.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_a_qlora_adapter_is_a_peft_folder_and_packs_a_dense_base_on_loading(tmp_path):
    model, x = _nudged(presets.qlora(r=4)), torch.randn(5, 64)
    report = rl.save(model, tmp_path / "a")
    assert report.format == "peft"
    assert any("kept as NormalFloat" in note for note in report.notes)
    fresh = net()
    rl.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(x), model(x))
    assert isinstance(fresh.up.weight, Packed)


def test_pack_false_lays_it_on_the_dense_base(tmp_path):
    model = _nudged(presets.qlora(r=4))
    rl.save(model, tmp_path / "a")
    fresh, x = net(), torch.randn(5, 64)
    bank = rl.load(fresh, tmp_path / "a", pack=False)
    assert not any(isinstance(p, Packed) for p in fresh.parameters())
    factors = dict(bank.adapters("default"))["up"]
    want = net().up(x) + factors.scaling * x @ factors.A.T @ factors.B.T
    assert torch.allclose(fresh.up(x), want, atol=1e-5)


@pytest.mark.parametrize("plan", SPLITS.values(), ids=SPLITS)
def test_an_adapter_of_a_split_base_belongs_on_that_base(tmp_path, plan):
    model, x = _nudged(plan), torch.randn(5, 64)
    report = rl.save(model, tmp_path / "a")
    assert report.format == "rankloom"
    assert "its base is made by" in str(report.compat)
    bare = copy.deepcopy(model)
    rl.detach(bare)
    rl.load(bare, tmp_path / "a")
    assert torch.equal(bare(x), model(x))
    for pack in (True, False):
        dense_base = net()
        with pytest.raises(FileError, match="belongs on the base that .* made|another base model"):
            rl.load(dense_base, tmp_path / "a", pack=pack)
        assert not hasattr(dense_base, "rankloom")
        assert not any(isinstance(p, Packed) for p in dense_base.parameters())


def test_another_dense_base_is_refused_for_an_adapter_that_packs_it(tmp_path):
    rl.save(_nudged(presets.qlora(r=4)), tmp_path / "a")
    other = net()
    with torch.no_grad():
        other.up.weight.mul_(1.01)
    with pytest.raises(FileError, match="made on another base model: the values of 'up.weight' differ"):
        rl.load(other, tmp_path / "a")
    packed = net()
    rl.attach(packed, presets.qlora(r=2), name="first")
    rl.load(packed, tmp_path / "a", name="second")


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_leaves_as_lora_on_the_base_that_it_made(name, tmp_path):
    from peft import PeftModel

    model = net()
    bank = rl.attach(model, SPLITS[name], calibration=batches())
    for site in bank.sites("default"):
        site.adapter.B.data.add_(0.1)
    x = torch.randn(5, 64)
    report = rl.export(model, tmp_path / "a")
    assert report.error < 1e-6
    assert report.saved.compat.peft.ok
    assert "belongs on the base that" in report.saved.notes[-1]
    assert model.rankloom.names == ("default",)
    base = net()
    for path in ("up", "down"):
        base.get_submodule(path).weight.data.copy_(dense(model.get_submodule(path).weight))
    there = PeftModel.from_pretrained(base, tmp_path / "a").eval()
    assert torch.allclose(there(x), model(x), atol=1e-5)
