"""Every deliberate fake is caught by the checks that it should be caught by, and its honest twin by none."""

from __future__ import annotations

from typing import Any

import fake_methods
import pytest
import torch
from fake_methods import FAKES, Honest, forgetful
from torch import Tensor, nn

import rankloom as rl
from rankloom import registry
from rankloom.testing import NAMES, Check, Unfit, check_method, checks, count

CAUGHT = [(name, check) for name, (_, caught) in FAKES.items() for check in caught]
TARGETS = ["q_proj", "down_proj"]


class Layers(nn.Module):
    """Two layers of two linear layers each, square and not."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict(_pair()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer["down_proj"](torch.tanh(layer["q_proj"](x))))
        return x


def _pair() -> dict[str, nn.Module]:
    return {"q_proj": nn.Linear(8, 8), "down_proj": nn.Linear(8, 8, bias=False)}


def make() -> nn.Module:
    torch.manual_seed(0)
    return Layers()


def run(model: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = model(batch)
    return out


BATCHES = [torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(s)) for s in range(2)]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Honest", *FAKES):
        monkeypatch.setitem(registry._METHODS, name, f"{fake_methods.__name__}:{name}")
    monkeypatch.setattr(nn.Linear, "extra_repr", nn.Linear.extra_repr)


def check_of(method: Any, name: str) -> Check:
    found = {c.name: c for c in checks(method, make, run, BATCHES, target_modules=TARGETS)}
    return found[name]


@pytest.mark.parametrize(("fake", "check"), CAUGHT, ids=[f"{fake}-{check}" for fake, check in CAUGHT])
def test_fake_is_caught(fake: str, check: str) -> None:
    cls, caught = FAKES[fake]
    method = forgetful() if fake == "ForgetsASetting" else cls()
    with pytest.raises(AssertionError) as error:
        check_of(method, check)()
    assert str(error.value).startswith(f"{fake} breaks {check!r} (")
    assert caught[check] in str(error.value)


@pytest.mark.parametrize("check", NAMES)
def test_honest_twin_passes(check: str) -> None:
    check_of(Honest(), check)()


def test_every_check_catches_a_fake() -> None:
    assert {check for _, check in CAUGHT} == set(NAMES) - {"kind_linear"}


def test_the_table_tells_what_broke_and_goes_on() -> None:
    cls, _ = FAKES["StartsNonzero"]
    table = check_method(cls(), make, run, BATCHES, target_modules=TARGETS)
    assert not table.ok
    assert [row.name for row in table] == list(NAMES)
    assert "identity" in {row.name for row in table.failed}
    assert "base_only" not in {row.name for row in table.failed}
    assert str(table).splitlines()[0] == f"StartsNonzero: {len(NAMES) - len(table.failed)} of {len(NAMES)} hold"


def test_a_check_leaves_random_numbers_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    check_of(Honest(), "reached")()
    assert torch.equal(torch.rand(3), wanted)


def test_a_count_that_is_off_is_refused() -> None:
    count(rl.LoRA(r=2), 4 * 2 * (8 + 8), make)()
    with pytest.raises(AssertionError, match=r"128 trainable numbers in 8 tensors, the formula gives 129 \(-1\)"):
        count(rl.LoRA(r=2), 129, make)()


def _random() -> nn.Module:
    return Layers()


def _norm() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_forward_hook(lambda module, args, out: out - out.mean(0))
    return model


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"make": _random}, "another model each time"),
        ({"make": _norm}, "the model itself answers a row"),
        ({"batches": []}, "batches is empty"),
        ({"batches": [torch.randn(1, 3, 8)]}, "of 2 rows or more"),
        ({"run": lambda model, batch: model(batch).mean(0)}, "first dim"),
        ({"run": lambda model, batch: model(batch).argmax(-1)}, "no floating-point"),
    ],
)
def test_a_model_that_cannot_carry_the_contract_is_refused(other: dict[str, Any], words: str) -> None:
    with pytest.raises(Unfit, match=words):
        checks(Honest(), **{"make": make, "run": run, "batches": BATCHES, **other})
