"""An adapter as tensors: what `state` gives, `load_state` takes, and nothing else; adapters at the sites of another."""

import pytest
import torch
from core_tiny import adapted, nudge, tower, words
from torch import nn

import rankloom as rl
from rankloom.core.state import put
from rankloom.errors import SettingsError, StateError, TargetError

IDS = words()


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(3, 6, 8))
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.bn(torch.einsum("bi,eoi->bo", x, self.experts))


CASES = {
    "lora": (rl.LoRA(r=2), {"modules_to_save": ["head"], "bias": "lora_only"}),
    "vera": (rl.VeRA(r=3), {}),
    "dora": (rl.DoRA(rl.LoRA(r=2)), {}),
    "frozen": (rl.LoRA(r=2, frozen="A"), {}),
    "hydra": (rl.hydralora(r=2, n_b=2), {}),
    "pissa": (rl.LoRA(r=2, init_lora_weights="pissa"), {}),
    "rows": (rl.LoRA(r=2), {"trainable_token_indices": [1, 3]}),
}


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_exact(case):
    method, plan = CASES[case]
    targets = {"target_modules": ["q_proj", "v_proj"], **plan}
    model, bank = adapted("a", method=method, model=tower().float(), **targets)
    out, state = model(IDS).detach(), bank.state("a")
    assert {key for key, _, _ in bank.tensors("a")} <= state.keys()
    nudge(bank, "a", seed=4)
    assert not torch.equal(model(IDS), out)
    bank.load_state("a", state)
    assert torch.equal(model(IDS), out)
    torch.manual_seed(77)
    other, twin = adapted("b", method=method, model=tower().float(), **targets)
    twin.load_state("b", state)
    assert torch.equal(other(IDS), out)


def test_stacked_experts_and_buffers_go_along():
    model = Experts()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=(), target_parameters=["experts"], modules_to_save=["bn"])
    nudge(bank)
    state = bank.state("default")
    assert state["experts:A"].shape == (3, 2, 8)
    assert "bn.running_mean:value" in state
    assert state["bn.num_batches_tracked:value"].dtype == torch.int64
    bank.load_state("default", {k: v + 1 for k, v in state.items()})
    assert all(torch.equal(v, state[k] + 1) for k, v in bank.state("default").items())


def test_it_is_a_copy_unless_asked_otherwise():
    _, bank = adapted("a", target_modules=["q_proj"])
    copied, live = bank.state("a"), bank.state("a", copy=False)
    nudge(bank, "a", seed=2)
    assert all(not torch.equal(copied[k], v) for k, v in bank.state("a").items())
    assert all(live[k] is p for k, p, _ in bank.tensors("a"))
    assert not any(t.requires_grad for t in copied.values())


@pytest.mark.parametrize(
    ("change", "words_"),
    [
        (lambda s: s.pop("layers.0.q_proj:A"), r"no tensor 'layers.0.q_proj:A' for the adapter 'a'"),
        (lambda s: s.update({"layers.0.q_proj:C": torch.zeros(1)}), r"'a' has no tensor 'layers.0.q_proj:C'"),
        (lambda s: s.update({"layers.0.q_proj:B": torch.zeros(1, 2)}), r"'layers.0.q_proj:B' has shape \(1, 2\)"),
        (lambda s: s.update({"layers.0.q_proj:B": s["layers.0.q_proj:B"].long()}), "torch.int64"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_written(change, words_):
    _, bank = adapted("a", target_modules=["q_proj"])
    before = bank.state("a")
    state = {k: v + 1 for k, v in before.items()}
    change(state)
    with pytest.raises(StateError, match=words_):
        bank.load_state("a", state)
    assert all(torch.equal(v, before[k]) for k, v in bank.state("a").items())


def test_an_adapter_that_takes_other_shapes_is_asked(monkeypatch):
    from rankloom.methods.lora import LoRAAdapter

    def fit_to(self, shapes):
        if shapes["A"][0] == shapes["B"][1]:
            self.A, self.B = (nn.Parameter(torch.zeros(shapes[k], dtype=torch.float64)) for k in "AB")

    monkeypatch.setattr(LoRAAdapter, "fit_to", fit_to)
    _, bank = adapted("a", target_modules=["q_proj"])
    kept = bank.state("a", copy=False)
    torn = {k: v[..., :1] if k.endswith("B") else v for k, v in bank.state("a").items()}
    with pytest.raises(StateError, match="has shape"):
        put(bank, "a", torn)
    assert all(v is kept[k] for k, v in bank.state("a", copy=False).items())
    less = {k: v[..., :1] if k.endswith("B") else v[:1] for k, v in bank.state("a").items()}
    bank.load_state("a", less)
    assert all(torch.equal(v, less[k]) for k, v in bank.state("a").items())


# the same sites -----------------------------------------------------------------------------------------------------


def test_an_adapter_at_the_sites_of_another():
    model, bank = adapted("a", target_modules=r".*1\.(q|v)_proj", modules_to_save=["head"], bias="all")
    rl.attach(model, rl.DoRA(rl.LoRA(r=1)), "b", like="a")
    assert [s.name for s in bank.sites("b")] == list(bank.adapted("a")) == ["layers.1.q_proj", "layers.1.v_proj"]
    assert bank.plans["b"].sites == bank.adapted("a")
    model = Experts()
    bank = rl.attach(model, rl.LoRA(r=2), "a", target_modules=(), target_parameters=["experts"])
    rl.attach(model, rl.LoRA(r=1), "b", like="a")
    assert [(s.name, s.slot) for s in bank.sites("b")] == [("experts", "experts")]


def test_attention_without_layers_is_found_by_its_sites():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    bank = rl.attach(model, rl.LoRA(r=2), "a", target_modules=["attn"])
    rl.attach(model, rl.LoRA(r=1), "b", like="a")
    assert bank.adapted("b") == bank.adapted("a") == ("attn.in_proj_weight", "attn.out_proj.weight")


def test_names_of_sites_are_whole_names_and_in_the_order_of_the_model():
    model = tower()
    bank = rl.attach(model, rl.LoRA(r=1), sites=["layers.1.q_proj", "layers.0.q_proj", "layers.1.q_proj"])
    assert bank.adapted("default") == ("layers.0.q_proj", "layers.1.q_proj")
    for sites, words_ in ((["q_proj"], "no layer or parameter 'q_proj'"), (["layers"], "cannot be adapted")):
        with pytest.raises(TargetError, match=words_):
            rl.attach(tower(), rl.LoRA(r=1), sites=sites)
    with pytest.raises(TargetError, match="lies in modules_to_save"):
        rl.attach(tower(), rl.LoRA(r=1), sites=["head"], modules_to_save=["head"])


@pytest.mark.parametrize(
    "other",
    [
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["q_proj"]},
        {"target_parameters": ["weight"]},
        {"layers_to_transform": 0},
        {"layers_pattern": "layers"},
    ],
)
def test_two_ways_of_choosing_are_refused(other):
    with pytest.raises(SettingsError, match="both say what is adapted"):
        rl.attach(tower(), rl.LoRA(r=1), sites=["layers.0.q_proj"], **other)
    model, _ = adapted("a")
    with pytest.raises(SettingsError, match="both say what is adapted"):
        rl.attach(model, rl.LoRA(r=1), "b", like="a", **other)
