"""An attach that fails halfway leaves the model as it was."""

from dataclasses import dataclass

import pytest
import torch
from core_tiny import adapted, assert_untouched, llama, snapshot, tower, words
from torch import nn

import rankloom as rl
from rankloom.core.adapter import Adapter
from rankloom.core.method import Method
from rankloom.errors import TargetError

IDS = words()


class Broken(Adapter):
    def __init__(self, site, at):
        super().__init__(site.name)
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
