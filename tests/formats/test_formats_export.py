"""Export to plain LoRA: exact where the rank suffices, with the right error where it does not."""

from __future__ import annotations

import pytest
import torch
from formats_tiny import X, adapted, net, shake
from torch import nn

import rankloom as rl
from rankloom.errors import NotMergeable, SettingsError
from rankloom.formats import export


def difference(a, b):
    return float((a - b).detach().abs().max())


def loaded(folder):
    model = net()
    rl.load(model, folder)
    return model


@pytest.mark.parametrize(
    "method",
    [
        rl.DoRA(rl.LoRA(r=2)),
        rl.VeRA(r=4),
        rl.AdaLoRA(init_r=4, target_r=2),
        rl.Slices(rl.LoRA(r=2), parts=2, on=(0, 1)),
        rl.LoRA(r=3, init_lora_weights="pissa"),
        rl.DoRA(rl.VeRA(r=4)),
        rl.LoRA(r=2, lora_bias=True),
    ],
    ids=lambda m: type(m).__name__,
)
def test_full_rank_is_the_same_function(method, tmp_path):
    model = adapted(method, modules_to_save=["score"], bias="lora_only")
    report = export(model, tmp_path / "a", r=8)
    assert report.error < 1e-5
    assert report.saved.format == "peft"
    assert report.saved.peft_type == "LORA"
    assert difference(loaded(tmp_path / "a")(X), model(X)) < 1e-5
    assert set(report.errors) == {f"layers.{i}.{n}" for i in range(2) for n in "qv"}


def test_the_error_is_the_tail_of_the_singular_values(tmp_path):
    model = adapted(rl.LoRA(r=6))
    changes = model.rankloom.delta("default")
    report = export(model, tmp_path / "a", r=2)
    tails, totals = 0.0, 0.0
    for name, change in changes.items():
        s = torch.linalg.svdvals(change)
        assert report.errors[name] == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-4)
        tails += float(s[2:].square().sum())
        totals += float(s.square().sum())
    assert report.error == pytest.approx((tails / totals) ** 0.5, rel=1e-4)
    assert report.error > 0.05


def test_the_model_is_left_as_it_was(tmp_path):
    model = adapted(rl.DoRA(rl.LoRA(r=2)))
    before, names = model(X), model.rankloom.names
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    export(model, tmp_path / "a", r=2)
    assert torch.equal(model(X), before)
    assert model.rankloom.names == names
    assert {k: p.requires_grad for k, p in model.named_parameters()} == flags


def test_a_routed_method_has_no_matrix(tmp_path):
    model = adapted(rl.hydralora(r=2))
    with pytest.raises(NotMergeable, match="LinearRouter"):
        export(model, tmp_path / "a")
    assert model.rankloom.names == ("default",)
    assert not (tmp_path / "a").exists()


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="as_='gguf'"):
        export(adapted(), tmp_path / "a", as_="gguf")


def test_convolutions_and_stacked_parameters(tmp_path):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 6, 3, padding=1, groups=2)
            self.experts = nn.ParameterDict({"w": nn.Parameter(torch.randn(3, 5, 6))})

        def forward(self, x):
            return torch.einsum("eoi,bit->beot", self.experts["w"], self.conv(x))

    def make():
        torch.manual_seed(4)
        return Mixed().eval()

    model = make()
    bank = rl.attach(model, rl.DoRA(rl.LoRA(r=2)), target_modules=["conv"], target_parameters=["experts.w"])
    shake(bank)
    report = export(model, tmp_path / "a", r=6)
    assert report.error < 1e-5
    again = make()
    rl.load(again, tmp_path / "a")
    x = torch.randn(2, 4, 5)
    assert difference(again(x), model(x)) < 1e-4
