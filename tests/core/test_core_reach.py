"""What is adapted is reached, and merges to what it said; or it is refused by name, with a remedy that works."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from core_tiny import nudge
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import rankloom as rl
from rankloom.errors import TargetError

D = torch.float64


class Half(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


class Standardised(nn.Linear):
    def forward(self, x):
        weight = (self.weight - self.weight.mean(-1, keepdim=True)) / self.weight.std(-1, keepdim=True)
        return F.linear(x, weight, self.bias)


class Router(nn.Linear):
    """Two outputs, as a mixture's router."""

    def forward(self, x):
        logits = super().forward(x)
        return logits, logits.sigmoid()


class Noisy(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight + 0.1 * torch.randn_like(self.weight), self.bias)


class Cast(nn.Linear):
    """A forward of its own that is the product all the same."""

    def forward(self, x, scale=1.0):
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias) * scale


class Offset(nn.Embedding):
    """Positions, as in OPT."""

    def forward(self, ids, past=0):
        return super().forward(ids.clamp_max(3) + 2 + past)


class SameSize(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def first(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("cls", [Half, Standardised, Router, Cast])
@pytest.mark.parametrize("method", [rl.LoRA(r=2), rl.DoRA(rl.LoRA(r=2)), rl.VeRA(r=4)])
def test_a_layer_with_a_forward_of_its_own_merges_to_what_it_said(cls, method):
    torch.manual_seed(0)
    model, x = nn.Sequential(cls(6, 6, dtype=D)), torch.randn(3, 6, dtype=D)
    base = first(model(x))
    bank = rl.attach(model, method, target_modules=["0"])
    assert torch.equal(first(model(x)), base)
    nudge(bank)
    given = first(model(x))
    assert (given - base).abs().max() > 1e-3
    bank.merge()
    torch.testing.assert_close(first(model(x)), given, rtol=0, atol=1e-12)
    bank.unmerge()
    rl.detach(model)
    assert torch.equal(first(model(x)), base)


def test_one_that_is_the_product_stays_a_layer():
    model = nn.Sequential(Cast(6, 4, dtype=D), nn.Linear(4, 4, dtype=D))
    bank = rl.attach(model, rl.LoRA(r=2))
    assert [name for name, _ in bank.adapters()] == ["0", "1"]


@pytest.mark.parametrize("cls", [Half, Standardised, Router, Noisy])
def test_all_linear_leaves_it_out_and_says_so(cls):
    model = nn.ModuleDict({"odd": cls(6, 6), "plain": nn.Linear(6, 6)})
    with pytest.warns(UserWarning, match=r"leaves out 'odd' \(its forward is more than a product"):
        bank = rl.attach(model, rl.LoRA(r=2))
    assert [name for name, _ in bank.adapters()] == ["plain"]


def test_a_look_at_a_forward_draws_no_random_numbers():
    model = nn.Sequential(Noisy(6, 6), nn.Linear(6, 6))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="leaves out"):
        rl.core.targets.linear_layers(model) and rl.core.targets.resolve(model, rl.Plan(rl.LoRA(r=2)))
    assert torch.equal(torch.get_rng_state(), before)


def test_positions_with_an_offset():
    torch.manual_seed(0)
    model, ids = nn.Sequential(Offset(8, 4, dtype=D)), torch.tensor([[0, 1, 2, 3]])
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["0"])
    nudge(bank)
    given = model(ids)
    bank.merge()
    torch.testing.assert_close(model(ids), given, rtol=0, atol=1e-12)
    with pytest.raises(TargetError, match="more than look rows up.*modules_to_save"):
        rl.attach(nn.Sequential(Offset(8, 4)), rl.LoRA(r=2), target_modules=[], trainable_token_indices={"0": [1]})


def test_a_convolution_with_a_forward_of_its_own_is_refused_and_the_remedies_work():
    def make():
        return nn.Sequential(SameSize(3, 3, 3), nn.Conv2d(3, 3, 3))

    with pytest.raises(TargetError, match=r"'0' \(SameSize\).*modules_to_save=\['0'\].*exclude_modules=\['0'\]"):
        rl.attach(make(), rl.LoRA(r=2), target_modules=["0", "1"])
    rl.attach(make(), rl.LoRA(r=2), target_modules=["1"], modules_to_save=["0"])
    rl.attach(make(), rl.LoRA(r=2), target_modules=["0", "1"], exclude_modules=["0"])


def weight_normed_before(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.3)


COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "spectral_norm": (parametrizations.spectral_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "orthogonal": (parametrizations.orthogonal, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "weight_norm before": (weight_normed_before, nn.utils.remove_weight_norm),
    "spectral_norm before": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "pruned": (pruned, lambda m: prune.remove(m, "weight")),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: nn.Conv1d(6, 6, 2), lambda: nn.Embedding(6, 6)])
def test_a_weight_that_is_computed_anew(name, make):
    compute, plain = COMPUTED[name]

    def model():
        return nn.ModuleDict({"odd": compute(make()), "plain": nn.Linear(6, 6)})

    remedy = r"'odd' computes its weight.*{}.*modules_to_save=\['odd'\].*exclude_modules=\['odd'\]"
    said = {
        "weight_norm before": "remove_weight_norm",
        "spectral_norm before": "remove_spectral_norm",
        "pruned": "prune",
    }
    with pytest.raises(TargetError, match=remedy.format(said.get(name, "remove_parametrizations"))):
        rl.attach(model(), rl.LoRA(r=2), target_modules=["odd", "plain"])
    made = model()
    plain(made["odd"])
    rl.attach(made, rl.LoRA(r=2), target_modules=["odd", "plain"])
    rl.attach(model(), rl.LoRA(r=2), target_modules=["odd", "plain"], exclude_modules=["odd"])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        bank = rl.attach(model(), rl.LoRA(r=2))
    assert [site for site, _ in bank.adapters()] == ["plain"]
    assert any("'odd'" in str(w.message) for w in told) == isinstance(made["odd"], nn.Linear)


class WithCompiledPart(nn.Module):
    def __init__(self, compile_it):
        super().__init__()
        torch.manual_seed(0)
        self.part, self.fc = compile_it(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.part(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("compile_it", [torch.jit.script, lambda m: torch.jit.trace(m.eval(), torch.randn(2, 8))])
def test_a_scripted_part_lies_beside(tmp_path, compile_it):
    model, x = WithCompiledPart(compile_it), torch.randn(3, 8)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(TargetError, match=r"'part.0'.*torch.jit.*before"):
        rl.attach(model, rl.LoRA(r=4), target_modules=["part.0"])
    with pytest.raises(TargetError, match=r"'part.0'.*torch.jit"):
        rl.attach(model, rl.LoRA(r=4), target_modules=["fc"], target_parameters=["part.0.weight"])
    bank = rl.attach(model, rl.LoRA(r=4))
    assert [name for name, _ in bank.adapters()] == ["fc"]
    rl.fit(model, [(x, torch.randn(3, 4))], steps=2, lr=1e-2)
    rl.save(model, tmp_path / "a")
    again = WithCompiledPart(compile_it)
    rl.load(again, tmp_path / "a")
    torch.testing.assert_close(again.eval()(x), model.eval()(x))
    rl.detach(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_a_lazy_layer_wants_its_first_batch():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    for targets in ("all-linear", ["0"]):
        with pytest.raises(TargetError, match=r"'0' \(LazyLinear\) has no shape.*call the model once"):
            rl.attach(model, rl.LoRA(r=2), target_modules=targets)
    model(torch.randn(2, 3))
    rl.attach(model, rl.LoRA(r=2))


class Recurrent(nn.Module):
    def __init__(self, cls):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.fc = cls(5, 4, num_layers=2, batch_first=True, dtype=D), nn.Linear(4, 3, dtype=D)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "where", [{"target_parameters": ["weight_ih_l0", "weight_hh_l1"]}, {"modules_to_save": ["rnn"]}]
)
def test_the_weights_of_a_recurrent_layer(tmp_path, cls, where):
    model, x = Recurrent(cls), torch.randn(2, 6, 5, dtype=D)
    base = model(x)
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["fc"], **where)
    torch.testing.assert_close(model(x), base, rtol=0, atol=1e-12)
    rl.fit(model, [(x, torch.randn(2, 6, 3, dtype=D))], steps=3, lr=1e-1)
    trained = [p.grad for key, p, _ in bank.trainable() if "rnn" in key]
    assert trained
    given = model(x)
    assert (given - base).abs().max() > 1e-2
    with bank.using():
        torch.testing.assert_close(model(x), base, rtol=0, atol=1e-12)
    rl.save(model, tmp_path / "a")
    again = Recurrent(cls)
    rl.load(again, tmp_path / "a")
    torch.testing.assert_close(again(x), given)
    bank.merge()
    torch.testing.assert_close(model(x), given, rtol=0, atol=1e-12)
    merged = copy.deepcopy(model)
    torch.testing.assert_close(merged(x), given, rtol=0, atol=1e-12)
    bank.unmerge()
    rl.detach(model)
    torch.testing.assert_close(model(x), base, rtol=0, atol=1e-12)
    assert type(model.rnn) is cls
    assert model.rnn._flat_weights[0] is model.rnn.weight_ih_l0
    rl.detach(merged)
    torch.testing.assert_close(merged(x), base, rtol=0, atol=1e-12)


def test_the_remedy_for_what_is_no_layer_names_its_parameters():
    model = nn.Sequential(nn.GRU(4, 4), nn.LayerNorm(4))
    with pytest.raises(TargetError, match=r"target_parameters=\['0.weight_ih_l0', '0.weight_hh_l0'\]") as told:
        rl.attach(model, rl.LoRA(r=2), target_modules=["0"])
    names = str(told.value).split("target_parameters=")[1]
    rl.attach(model, rl.LoRA(r=2), target_modules=[], target_parameters=eval(names))  # noqa: S307
    with pytest.raises(TargetError, match="'1' is a LayerNorm, which cannot be adapted as a layer$"):
        rl.attach(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(4)), rl.LoRA(r=2), target_modules=["1"])


def test_a_layer_is_called_once_to_be_known():
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(1)
            return super().forward(x) * 0.5

    model = nn.Sequential(Counted(4, 4), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="leaves out '0'"):
        rl.attach(model, rl.LoRA(r=2))
    rl.detach(model)
    rl.attach(model, rl.LoRA(r=2), target_modules=["0"])
    assert len(calls) == 1
