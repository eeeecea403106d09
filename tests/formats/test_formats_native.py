"""The folder for what PEFT has not: same shape, every tensor, the plan as data."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from formats_tiny import X, adapted, config, edit_config, net, shake
from torch import nn

import rankloom as rl
from rankloom.errors import FileError, SettingsError, StateError
from rankloom.methods.adalora import compact

PLANS = {
    "hydralora": rl.hydralora(r=2, n_b=3),
    "slices": rl.Slices(rl.LoRA(r=2), parts=4, on=(0, 3)),
    "dora-vera": rl.DoRA(rl.VeRA(r=4)),
    "dora-adalora": rl.DoRA(rl.AdaLoRA(init_r=4, target_r=2)),
    "vera-sliced": rl.Slices(rl.VeRA(r=4, save_projection=False), parts=2, on=(1,)),
    "dora-column": rl.DoRA(rl.LoRA(r=2), norm_axis="column"),
    "slices-pissa": rl.Slices(rl.LoRA(r=2, init_lora_weights="pissa"), parts=2, on=(0,)),
}


def build(method, **settings):
    model = net()
    bank = rl.attach(model, method, **{"target_modules": ["q", "v"], **settings})
    generator = torch.Generator().manual_seed(3)
    for _, parameter, role in bank.tensors("default"):
        if role != "basis":
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("id_", PLANS)
def test_round_trip_is_bitwise(id_, tmp_path):
    model = build(PLANS[id_], modules_to_save=["score"], bias="lora_only")
    report = rl.save(model, tmp_path / "a")
    assert (report.format, report.peft_type) == ("rankloom", "RANKLOOM")
    assert not report.compat.peft.ok
    assert report.compat.peft.why
    again = net()
    bank = rl.load(again, tmp_path / "a")
    assert torch.equal(again(X), model(X))
    assert bank.plans["default"] == model.rankloom.plans["default"]
    before = {k: v for k, v, _ in model.rankloom.tensors("default")}
    after = {k: v for k, v, _ in bank.tensors("default")}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_unrolled_convolutions(tmp_path):
    def make():
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(2, 4, 3, groups=2)).eval()

    model = make()
    bank = rl.attach(model, rl.UnrolledLoRA(r=2), target_modules=["0"])
    shake(bank)
    rl.save(model, tmp_path / "a")
    again = make()
    rl.load(again, tmp_path / "a")
    x = torch.randn(1, 2, 5, 5)
    assert torch.equal(again(x), model(x))


def test_dilated_convolutions_are_ours_because_peft_ignores_the_dilation(tmp_path):
    def make():
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv2d(2, 4, 3, dilation=2, padding=2)).eval()

    model = make()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["0"])
    shake(bank)
    assert "ignores dilation" in str(rl.save(model, tmp_path / "a").compat)
    again = make()
    rl.load(again, tmp_path / "a")
    x = torch.randn(1, 2, 5, 5)
    assert torch.equal(again(x), model(x))


def test_the_shared_basis_is_left_out_when_it_comes_from_a_key(tmp_path):
    from safetensors import safe_open

    keys = {}
    for keep in (True, False):
        model = build(rl.DoRA(rl.VeRA(r=4, save_projection=keep, projection_prng_key=9)))
        rl.save(model, tmp_path / str(keep))
        with safe_open(tmp_path / str(keep) / "adapter_model.safetensors", "pt") as file:
            keys[keep] = set(file.keys())
        again = net()
        rl.load(again, tmp_path / str(keep))
        assert torch.equal(again(X), model(X))
    assert keys[True] - keys[False] == {"shared:vera_A", "shared:vera_B"}


def test_compacted_triplets_inside_dora(tmp_path):
    model = build(PLANS["dora-adalora"])
    for i, (_, adapter) in enumerate(model.rankloom.adapters("default")):
        adapter.inner.E.data[: 1 + i % 2] = 0
        compact(adapter.inner)
    rl.save(model, tmp_path / "a")
    again = net()
    bank = rl.load(again, tmp_path / "a")
    assert torch.equal(again(X), model(X))
    assert {a.inner.A.shape[0] for _, a in bank.adapters("default")} == {2, 3}


def test_buffers_of_saved_modules(tmp_path):
    def make():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).train()

    model = make()
    bank = rl.attach(model, rl.hydralora(r=2), target_modules=["0"], modules_to_save=["1"])
    shake(bank)
    for _ in range(3):
        model(X * 2)
    model.eval()
    rl.save(model, tmp_path / "a")
    again = make().eval()
    rl.load(again, tmp_path / "a")
    assert torch.equal(again(X), model(X))


def test_rules_and_dtype_travel_with_the_plan(tmp_path):
    plan = rl.Plan(rl.LoRA(r=2, frozen="A"), target_modules=("q",), rules=(rl.LoRAPlus(ratio=4),), dtype="float64")
    for method in (plan, dataclasses.replace(plan, method=rl.hydralora(r=2))):
        model = net()
        rl.attach(model, method)
        folder = tmp_path / type(method.method).__name__
        rl.save(model, folder)
        bank = rl.load(net(), folder)
        assert bank.plans["default"] == method
        assert all(p.dtype == torch.float64 for _, p, _ in bank.tensors("default"))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.emb = nn.Embedding(6, 8)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(self.emb(x))


@pytest.mark.parametrize("targets", [["emb"], ["emb", "head"], []])
def test_rows_and_an_adapter_on_one_embedding(targets, tmp_path):
    model = Words().eval()
    settings = {"target_modules": targets, "trainable_token_indices": {"emb": [4, 1]}}
    shake(rl.attach(model, rl.LoRA(r=2), **settings))
    report = rl.save(model, tmp_path / "a")
    assert report.format == "rankloom"
    again = Words().eval()
    rl.load(again, tmp_path / "a")
    x = torch.tensor([[0, 1, 4, 5]])
    assert torch.equal(again(x), model(x))


def test_modules_trained_whole_alone(tmp_path):
    model = adapted(target_modules=[], modules_to_save=["score"])
    report = rl.save(model, tmp_path / "a")
    assert "PEFT: no (PEFT needs at least one adapted layer)" in str(report.compat)
    again = net()
    rl.load(again, tmp_path / "a")
    assert torch.equal(again(X), model(X))


def test_a_frozen_factor_stays_frozen_after_loading(tmp_path):
    model = adapted(rl.lora_fa(r=2))
    rl.save(model, tmp_path / "a")
    bank = rl.load(net(), tmp_path / "a")
    assert {role for _, p, role in bank.tensors("default") if p.requires_grad} == {"out"}
    assert bank.plans["default"] == model.rankloom.plans["default"]


class Home(rl.Rule):
    pass


def test_an_unregistered_rule_is_refused_with_the_remedy(tmp_path):
    model = adapted(rl.Plan(rl.LoRA(r=2), target_modules=("q",), rules=(Home(),)), target_modules=["q"])
    with pytest.raises(SettingsError, match=r"register your own methods and rules by name"):
        rl.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_the_reader_refuses(tmp_path):
    rl.save(build(PLANS["hydralora"]), tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    good = config(tmp_path / "a")
    plan = good["plan"]
    cases = [
        ({"format": 9}, "format 9.*upgrade"),
        ({"zz": 1}, "'zz' is no field"),
        ({"plan": 3}, "'plan' is 3"),
        ({"plan": {**plan, "method": {"name": "mixtur"}}}, "did you mean 'mixture'"),
        ({"plan": {**plan, "method": {"name": "os.system"}}}, "os.system"),
        ({"plan": {**plan, "method": {**plan["method"], "n": 4}}}, r"layers.0.q:experts.B' has shape \(3, 8, 2\)"),
        (
            {"plan": {**plan, "method": {**plan["method"], "inner": {"name": "lora", "r": 10**8}}}},
            "a rank is from 1 to 4096",
        ),
        ({"plan": {**plan, "target_modules": "(a+)+"}}, r"the regular expression '\(a\+\)\+' matches no whole name"),
        ({"plan": {**plan, "target_modules": "(a+"}}, "target_modules: '\\(a\\+' is no regular expression"),
        ({"plan": {**plan, "target_modules": ["q"]}}, "belongs to nothing"),
        ({"plan": {**plan, "target_modules": ["qq"]}}, "'qq' matches nothing"),
    ]
    for change, message in cases:
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(good))
        edit_config(tmp_path / "a", **change)
        model = net()
        with pytest.raises(FileError, match=message):
            rl.load(model, tmp_path / "a")
        assert not hasattr(model, "rankloom")


def test_regular_expressions_keep_their_wording_and_long_ones_become_names(tmp_path):
    wild = r"(layers\.\d+\.)+(q|v)"
    model = build(rl.hydralora(r=2), target_modules=wild, rank_pattern={r"(v)+": 3})
    rl.save(model, tmp_path / "a")
    plan = config(tmp_path / "a")["plan"]
    assert (plan["target_modules"], plan["rank_pattern"]) == (wild, {r"(v)+": 3})
    again = net()
    rl.load(again, tmp_path / "a")
    assert torch.equal(again(X), model(X))
    long = "|".join([wild] * 200)
    model = build(rl.hydralora(r=2), target_modules=long, rank_pattern={f"(?:(?:{long})|(?:v)+)": 3})
    rl.save(model, tmp_path / "b")
    plan = config(tmp_path / "b")["plan"]
    assert plan["target_modules"] == ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"]
    assert plan["rank_pattern"] == {rf"^layers\.{n}\.{x}": 3 for n in (0, 1) for x in "qv"}
    again = net()
    rl.load(again, tmp_path / "b")
    assert torch.equal(again(X), model(X))


def test_nan_is_not_saved(tmp_path):
    model = adapted()
    next(p for _, p, _ in model.rankloom.tensors("default")).data[0] = float("nan")
    with pytest.raises(StateError, match="NaN or infinite values: the training went wrong"):
        rl.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_numbers_must_be_there(tmp_path):
    with torch.device("meta"):
        model = net()
    rl.attach(model, rl.LoRA(r=2), target_modules=["q"])
    with pytest.raises(StateError, match="on the meta device"):
        rl.save(model, tmp_path / "a")
