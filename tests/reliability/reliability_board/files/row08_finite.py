"""Row 8: non-finite numbers cannot hide: tensors are looked at, never only a loss or logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankloom as rl
from rankloom.core.bank import Bank
from rankloom.core.rule import Rule
from rankloom.errors import FileError, RankloomError, StateError
from rankloom.formats import manifest as gate
from rankloom.train import guard
from rankloom.train.checkpoint import newest_checkpoint
from rankloom.train.guard import DivergedError
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.files.world import (
    IDS,
    Files,
    adapted,
    answer,
    bare,
    base,
    folder,
    good,
    silent,
    state_digest,
    tensors_of,
    with_tensors,
    write,
)  # fmt: skip

BAD = (float("nan"), float("inf"), float("-inf"))
STEPS = 4


class Poison(Rule):
    """Puts a value into gradients, optimizer state or weights at a step, on its own."""

    def __init__(self, where: str, value: float, at: int) -> None:
        self.where, self.value, self.at = where, value, at

    def after_backward(self, run: Any) -> None:
        if self.where == "gradient" and run.step == self.at:
            self._spoil(next(iter(run.parameters.values())).grad)

    def after_step(self, run: Any) -> None:
        if run.step != self.at:
            return
        parameter = next(iter(run.parameters.values()))
        if self.where == "weight":
            self._spoil(parameter.data)
        if self.where == "optimizer":
            for state in run.optimizer.state.values():
                self._spoil(state["exp_avg"])

    def _spoil(self, tensor: Tensor) -> None:
        tensor.view(-1)[0] = self.value


def measure(budget: Budget) -> Finding:
    """NaN and infinities in files, in adapters that are saved or merged, and in the steps of a run."""
    faults: list[str] = []
    count = 0
    with silent(), torch.random.fork_rng([]):
        files = bare(good())
        keys = sorted(tensors_of(files))[:: budget.of(1, 4)]
        for value in BAD[:: budget.of(1, 2)]:
            for key in keys:
                for attention in ("sdpa", "eager"):
                    count += 1
                    faults += _note(f"{value} in {key} of a file, {attention}", _load(files, key, value, attention))
            for index in range(0, 8, budget.of(1, 4)):
                for act in ("save", "merge", "fold"):
                    count += 1
                    faults += _note(f"{value} in tensor {index} at {act}", _use(index, value, act))
            for where in ("gradient", "optimizer", "weight"):
                for at in (1, STEPS - 1):
                    count += 1
                    faults += _note(f"{value} in a {where} at step {at}", _train(where, value, at))
    return Finding(not faults, f"{count - len(faults)} of {count} refused by the tensor's name", tuple(faults))


def _note(name: str, fault: str | None) -> list[str]:
    return [f"{name}: {fault}"] if fault else []


def _load(files: Files, key: str, value: float, attention: str) -> str | None:
    tensor = tensors_of(files)[key].clone()
    tensor[-1, -1] = value
    model = base(attn_implementation=attention)
    with folder() as root:
        try:
            rl.load(model, write(with_tensors(files, **{key: tensor}), root / "a"))
        except FileError as error:
            return None if key in str(error) else f"refused without the tensor's name: {error}"
    return f"loaded; the logits are {'finite' if bool(answer(model).isfinite().all()) else 'not finite'}"


def _use(index: int, value: float, act: str) -> str | None:
    model = base()
    before = state_digest(model)
    adapted(model)
    bank: Bank = model.rankloom  # type: ignore[assignment]
    key, parameter, _ = list(bank.tensors("default"))[index]
    parameter.data.view(-1)[-1] = value
    with folder() as root:
        try:
            rl.save(model, root / "a") if act == "save" else getattr(bank, act)("default")
        except StateError as error:
            left = [p.name for p in root.iterdir()]
            rl.detach(model)
            named = "lora_" in str(error) or key in str(error)
            whole = state_digest(model) == before and not left
            return None if named and whole else f"{error}; left: {left}"
    return "accepted"


def _train(where: str, value: float, at: int) -> str | None:
    """The run must stop by itself, and no checkpoint may hold what is not finite."""
    model: nn.Module = adapted(base())
    settings = rl_settings()
    with folder() as root:
        try:
            rl.fit(model, _batches(), settings=settings, rules=[Poison(where, value, at)], out=root / "run")
        except DivergedError as error:
            fault = None if "finite" in str(error) else f"stopped without saying why: {error}"
        except RankloomError as error:
            fault = f"{type(error).__name__}: {error}"
        else:
            fault = "the run ended as if nothing had happened"
        return fault or _hidden(root / "run" / "checkpoints")


def rl_settings() -> Any:
    """A few steps, each with a checkpoint."""
    from rankloom.train.settings import TrainSettings

    return TrainSettings(steps=STEPS, lr=1e-3, save_every=1)


def _batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": IDS, "labels": IDS}]


def _hidden(root: Path) -> str | None:
    found = newest_checkpoint(root)
    if found is None or all(bool(t.isfinite().all()) for t in found.weights.values() if t.is_floating_point()):
        return None
    return "a checkpoint holds values that are not finite"


@contextmanager
def _by_logits() -> Iterator[None]:
    """Files are judged by the model's answer: fused attention turns NaN in a query into a finite answer."""
    with swapped(gate, "check_values", lambda *a: None):
        yield


ROW = Row(
    8,
    "non-finite numbers cannot hide",
    measure,
    (
        Sabotage("files are judged by logits", _by_logits),
        Sabotage("weights are not looked at", lambda: swapped(guard, "check_finite", lambda *a: None)),
        Sabotage("merging looks at nothing", lambda: swapped(Bank, "_finite", lambda *a: None)),
    ),
)
