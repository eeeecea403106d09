"""A run that broke off and was taken up by new objects is bit for bit the run that never broke off."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from train_world import (
    Interrupted,
    attached,
    breaking_at,
    llama,
    mlp,
    plan_of,
    points,
    settings,
    straight_and_resumed,
    texts,
    world_of,
)

import rankloom as rl
from rankloom import registry
from rankloom.core.plan import Plan
from rankloom.core.rule import Rule
from rankloom.errors import StateError
from rankloom.train import loop, stream
from rankloom.train.checkpoint import steps_in
from rankloom.train.data import Batches, Prepared
from rankloom.train.data.examples import Example, Examples
from rankloom.train.data.records import Records, Where
from rankloom.train.fit import fit
from rankloom.train.ruleset import RuleSet

LORA = Plan(rl.LoRA(r=3, lora_dropout=0.2), target_modules=("o_proj", "up_proj"))


def last_files(out: Path) -> dict[str, bytes]:
    """Weights, optimizer, random state, rules' memory and data position of the newest checkpoint, as bytes."""
    root = out / "checkpoints"
    newest = root / f"step-{steps_in(root)[-1]:08d}"
    return {name: (newest / name).read_bytes() for name in ("weights.safetensors", "state.safetensors")}


def same(out: Path, *args: Any, **kwargs: Any) -> bool:
    (_, one), (_, two) = straight_and_resumed(*args, out=out, **kwargs)
    assert one.steps == two.steps == 12
    assert len(two.losses) == 12
    return one.losses == two.losses and last_files(out / "straight") == last_files(out / "broken")


ON_OTHERS = {"blend", "lora_flow", "xlora"}
"""They weigh adapters that are there already, and have tests of their own."""


@pytest.mark.parametrize("name", sorted(registry.METHODS.keys() - ON_OTHERS))
def test_every_method_resumes_exactly(name: str, tmp_path: Path) -> None:
    make, batches = world_of(name)
    assert same(tmp_path, make, {"default": plan_of(name)}, batches, settings())


def test_rules_from_outside_resume_exactly(tmp_path: Path) -> None:
    assert same(tmp_path, llama, {"default": LORA}, texts(), settings(schedule="linear"), rules=[rl.LoRAPlus])


def test_several_adapters_resume_exactly(tmp_path: Path) -> None:
    assert same(tmp_path, llama, {"a": LORA, "b": plan_of("adalora"), "c": plan_of("vera")}, texts(), settings())


@pytest.mark.parametrize("at", [1, 3, 11])
def test_any_step_will_do(at: int, tmp_path: Path) -> None:
    assert same(tmp_path, llama, {"default": LORA}, texts(), settings(), at=at)


def test_shuffling_loader_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    def source() -> DataLoader[Any]:
        return DataLoader(texts(), batch_size=None, shuffle=True)

    assert same(tmp_path, llama, {"default": LORA}, source, settings(accumulate=1))


def test_loader_with_its_own_generator_resumes(tmp_path: Path) -> None:
    def source() -> DataLoader[Any]:
        return DataLoader(texts(), batch_size=None, shuffle=True, generator=torch.Generator().manual_seed(3))

    assert same(tmp_path, llama, {"default": LORA}, source, settings())


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, i: int) -> Any:
        return {"input_ids": torch.randint(64, (2, 6)), "labels": torch.randint(64, (2, 6))}


def test_data_that_draws_random_numbers_resumes(tmp_path: Path) -> None:
    assert same(tmp_path, llama, {"default": LORA}, lambda: DataLoader(Noisy(), batch_size=None), settings())


def test_function_of_the_step_resumes(tmp_path: Path) -> None:
    made = texts()
    assert same(tmp_path, llama, {"default": LORA}, lambda: lambda i: made[i * 3 % 7], settings())


def augmented(example: Example, draw: torch.Generator) -> Example:
    other = torch.randint(1, 64, (len(example),), generator=draw)
    masked = torch.rand(len(example), generator=draw) < 0.3
    ids = torch.where(masked, other, torch.tensor(example.ids))
    return replace(example, ids=array("i", ids.tolist()))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("augment", [None, augmented])
def test_prepared_batches_resume(augment: Any, packing: bool, tmp_path: Path) -> None:
    found = [
        Example(array("i", range(i, i + 4 + i % 3)), bytes([0] + [1] * (3 + i % 3)), None, Where("x", i))
        for i in range(1, 12)
    ]
    made = Prepared(Examples.of(found), Records((), "text", "x", ()), 16, 0, None, 0, 0, ())

    def source() -> Any:
        return Batches(made, 2, seed=4, packing=packing, augment=augment)

    assert same(tmp_path, llama, {"default": LORA}, source, settings())


def test_whole_model_without_adapters_resumes(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = mlp()
        return nn.Sequential(*model[:2], nn.BatchNorm1d(8), nn.Dropout(0.2), model[2])

    results = []
    for out, report in (("straight", None), ("broken", breaking_at(5)), ("broken", None)):
        model = make()
        chosen = settings(save_every=5)
        try:
            results.append(
                (model, fit(model, points(), settings=chosen, out=tmp_path / out, report=report, resume=True))
            )
        except Interrupted:
            continue
    (one, straight), (two, resumed) = results
    assert straight.losses == resumed.losses
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert two[2].num_batches_tracked == 24


def test_trained_statistics_resume(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    plan = Plan(rl.LoRA(r=2), target_modules=("0",), modules_to_save=("1",))
    assert same(tmp_path, make, {"default": plan}, points(), settings())


@dataclass
class Counting(Rule):
    """Memory of every shape that a checkpoint must carry."""

    seen: dict[Any, Any] = field(default_factory=dict, init=False)

    def start(self, run: Any) -> None:
        self.seen = {"n": 0, 3: (1.5, None), "inf": float("inf"), "half": torch.zeros(2, dtype=torch.bfloat16)}

    def after_step(self, run: Any) -> None:
        self.seen["n"] += 1
        self.seen["half"] += 1

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen, "flag": torch.tensor(True)}

    def restore(self, state: dict[str, Any]) -> None:
        assert state["flag"].dtype == torch.bool
        self.seen = state["seen"]


def test_rule_memory_of_any_shape_comes_back(tmp_path: Path) -> None:
    rules: list[Counting] = []

    def make_rule() -> Counting:
        rules.append(Counting())
        return rules[-1]

    list(straight_and_resumed(mlp_world, {"default": Plan(rl.LoRA(r=2))}, points(), settings(), tmp_path, [make_rule]))
    straight, _, resumed = rules
    assert str(straight.seen) == str(resumed.seen)
    assert resumed.seen["n"] == 12
    assert resumed.seen[3] == (1.5, None)
    assert resumed.seen["half"].dtype == torch.bfloat16


def mlp_world() -> nn.Module:
    return mlp()


# Deliberate defects: each must be seen by the comparison above.


@pytest.mark.parametrize("what", ["random numbers", "optimizer", "data", "weights"])
def test_forgetting_is_noticed(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = lambda *a, **k: None  # noqa: E731
    if what == "random numbers":
        monkeypatch.setattr(loop, "set_rng_state", nothing)
    elif what == "optimizer":
        monkeypatch.setattr(loop, "restore_optimizer", nothing)
    elif what == "data":
        monkeypatch.setattr(stream._Repeated, "restore", nothing)
    else:
        monkeypatch.setattr(loop, "restore_weights", nothing)
    assert not same(tmp_path, llama, {"default": LORA}, texts(), settings())


def test_a_forgotten_rule_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RuleSet, "restore", lambda *a: None)
    assert not same(tmp_path, llama, {"default": plan_of("adalora")}, texts(), settings())


# What must be refused.


def broken_off(out: Path, rules: Any = ()) -> None:
    with pytest.raises(Interrupted):
        fit(attached(llama, {"default": LORA}, 1), texts(), rules=rules, settings=settings(save_every=5), out=out,
            report=breaking_at(5))  # fmt: skip


def test_another_base_is_refused(tmp_path: Path) -> None:
    broken_off(tmp_path)
    other = attached(lambda: llama(seed=1), {"default": LORA}, 1)
    with pytest.raises(StateError, match="another base model"):
        fit(other, texts(), settings=settings(), out=tmp_path, resume="auto")


def test_other_adapters_are_refused(tmp_path: Path) -> None:
    broken_off(tmp_path)
    other = Plan(rl.LoRA(r=3, lora_alpha=3, lora_dropout=0.2), target_modules=("o_proj", "up_proj"))
    with pytest.raises(StateError, match=r"adapter 'default' is .*'lora_alpha': 3"):
        fit(attached(llama, {"default": other}, 1), texts(), settings=settings(), out=tmp_path, resume="auto")


def test_other_settings_are_refused_and_more_steps_are_warned_of(tmp_path: Path) -> None:
    broken_off(tmp_path)
    with pytest.raises(StateError, match=r"lr=0.1, but the checkpoint was made with lr=0.005"):
        fit(attached(llama, {"default": LORA}, 1), texts(), settings=settings(lr=0.1), out=tmp_path, resume="auto")
    with pytest.warns(UserWarning, match="steps=14, the checkpoint's run had 12"):
        result = fit(
            attached(llama, {"default": LORA}, 1), texts(), settings=settings(steps=14), out=tmp_path, resume=True
        )
    assert result.steps == len(result.losses) == 14


def test_other_rules_and_other_data_are_refused(tmp_path: Path) -> None:
    broken_off(tmp_path)
    with pytest.raises(StateError, match=r"rules none, this run has \['LoRAPlus'\]"):
        fit(attached(llama, {"default": LORA}, 1), texts(), rules=[rl.LoRAPlus()], settings=settings(), out=tmp_path,
            resume=True)  # fmt: skip
    broken_off(tmp_path / "plus", rules=[rl.LoRAPlus(ratio=4)])
    with pytest.raises(StateError, match=r"made with LoRAPlus.*'ratio': 4.*this run has LoRAPlus\(ratio=16"):
        fit(attached(llama, {"default": LORA}, 1), texts(), rules=[rl.LoRAPlus()], settings=settings(),
            out=tmp_path / "plus", resume=True)  # fmt: skip
    with pytest.raises(StateError, match="batches of another kind"):
        fit(attached(llama, {"default": LORA}, 1), lambda i: texts()[0], settings=settings(), out=tmp_path, resume=True)
    with pytest.raises(StateError, match="the length of the list is 2 here and 7 there"):
        fit(attached(llama, {"default": LORA}, 1), texts(2), settings=settings(), out=tmp_path, resume=True)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    model = attached(llama, {"default": LORA}, 1)
    one = fit(model, texts(), settings=settings(), out=tmp_path, evaluate=texts(2))
    other = attached(llama, {"default": LORA}, 2)
    two = fit(other, texts(), settings=settings(), out=tmp_path, evaluate=texts(2), resume="auto")
    assert (one.losses, one.metrics) == (two.losses, two.metrics)
    assert one.metrics["before"] != one.metrics["after"]
