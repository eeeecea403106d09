"""Rules inside transformers' `Trainer` and TRL's `SFTTrainer`: one optimizer factory and one callback.

    optimizer = optimizer_for(model, lr=1e-3, rules=[LoRAPlus(ratio=16)])
    Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[RankloomCallback()]).train()

The hooks are those of `rankloom.fit`, in the same order. What the Trainer makes different:

- It clips before its callbacks hear of the gradients: rules see clipped ones, and what they change is clipped again.
- A rule's `loss` may only add to the loss: it is applied to a zero loss once a step, and its gradient is added to those
  of the Trainer, which logs the loss without it.
- Nobody but the user can add the callback: an optimizer of `optimizer_for` refuses to step while rules have hooks and
  no callback drives them. A Trainer with neither is warned in its second step (`core/undriven.py`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.optim import Optimizer

from rankloom.core.bank import Bank
from rankloom.core.rule import Rule
from rankloom.core.undriven import DRIVEN
from rankloom.errors import FileError, MissingExtra, SettingsError, StateError
from rankloom.files.folders import read_folder, write_folder
from rankloom.files.manifest import sealed
from rankloom.files.strict import as_json
from rankloom.train import guard
from rankloom.train.drive import Rules
from rankloom.train.run import TrainRun, bank_or_none, base_statistics, trainable
from rankloom.train.tree import pack, unpack

PLACE = "rankloom"
"""Folder inside a Trainer's checkpoint: `rules/` and `adapters/<name>/`."""
KIND = "rankloom-rules"


@dataclass
class _Made:
    """What `optimizer_for` knows of an optimizer: its rules, and whether a callback drives them."""

    rules: Rules
    driven: bool = False


_MADE: WeakKeyDictionary[Optimizer, _Made] = WeakKeyDictionary()


def optimizer_for(
    model: nn.Module,
    lr: float = 1e-3,
    rules: Iterable[Rule] = (),
    weight_decay: float = 0.0,
    *,
    make: Callable[..., Optimizer] = torch.optim.AdamW,
    **settings: Any,
) -> Optimizer:
    """An optimizer over what trains in the active adapters, its groups passed through every rule.

    Args:
        model: with adapters attached.
        lr, weight_decay: of every group, before the rules' `groups` change them.
        rules: beside those of the adapters' methods and plans; a `RankloomCallback` takes them over from here.
        make: the class, called as `make(groups, lr=lr, **settings)`; `settings` go to it (betas=, eps=, momentum= …).

    Raises:
        SettingsError: two rules fight, or nothing is trainable.
        StateError: no adapters, none active, or merged; at the first step, if rules have hooks and no callback runs.
    """
    bank = _bank(model)
    run = TrainRun(model, total_steps=0, parameters=trainable(model))
    driver = Rules(bank, rules)
    parameters = list(dict.fromkeys(run.parameters.values()))
    groups = driver.groups(run, [{"params": parameters, "lr": lr, "weight_decay": weight_decay}])
    optimizer = make(groups, lr=lr, **settings)
    made = _Made(driver)
    _MADE[optimizer] = made
    if any(driver.uses(hook) for hook in DRIVEN):
        optimizer.register_step_pre_hook(functools.partial(_refuse_undriven, made))
    return optimizer


def _refuse_undriven(made: _Made, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not made.driven:
        names = ", ".join(type(rule).__name__ for rule in made.rules.each)
        raise StateError(f"nobody drives the rules {names}: add RankloomCallback() to the Trainer's callbacks")


class RuleDriver:
    """The callback without its base class: every hook of a rule at its place in the Trainer's step.

    Args:
        rules: beside those of the adapters, and those that `optimizer_for` was given.
        resume_from: the Trainer checkpoint that a resumed run takes the rules' memory from; default: the one of the
            resumed step in `args.output_dir`.
    """

    def __init__(self, rules: Iterable[Rule] = (), resume_from: str | Path | None = None) -> None:
        self.passed = tuple(rules)
        self.resume_from = None if resume_from is None else Path(resume_from)
        self._rules: Rules | None = None
        self._run: TrainRun | None = None
        self._unchecked = True
        self._still: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """`start`, and on a resumed run `restore`."""
        model, optimizer = trainer["model"], _plain(trainer["optimizer"])
        bank, made = _bank(model), _MADE.get(optimizer)
        rules = Rules(bank, (*(made.rules.each if made else ()), *self.passed))
        _check_groups(rules, made)
        parameters = trainable(model)
        device = next(iter(parameters.values())).device
        run = TrainRun(model, state.max_steps, parameters, step=state.global_step, device=device)
        run.optimizer = optimizer
        rules.start(run)
        if state.global_step and rules.each:
            folder = self.resume_from or _checkpoint(args, state)
            rules.restore(_read_rules(folder / PLACE / "rules", rules, device))
        self._rules, self._run, self._unchecked = rules, run, True
        self._still = [m.register_forward_pre_hook(_evaluating) for m in model.modules() if base_statistics(m)]
        if made:
            made.driven = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """`before_step`."""
        rules, run = self._going()
        run.step = state.global_step
        rules.before_step(run)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Penalties, `after_backward`, and clipping once more if they changed a gradient."""
        rules, run = self._going()
        if self._unchecked:
            guard.check_gradients(run.parameters, "error")
            _check_adds(rules, run)
            self._unchecked = False
        if not self._finite(trainer["optimizer"]):
            return
        _add_penalties(rules, run)
        rules.after_backward(run)
        if args.max_grad_norm and (rules.uses("loss") or rules.uses("after_backward")):
            guard.scale_gradients(run.parameters, float(guard.total_norm(run.parameters)), args.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """`after_step`; the gradients are still there."""
        rules, run = self._going()
        if self._finite(trainer["optimizer"]):
            rules.after_step(run)

    def on_save(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """The rules' memory and each active adapter, into the Trainer's own checkpoint."""
        if not state.is_world_process_zero:
            return
        from rankloom import formats

        rules, run = self._going()
        folder = _checkpoint(args, state)
        if not folder.is_dir():
            raise StateError(f"{folder}: no checkpoint of the Trainer there to write the rules' memory into")
        if rules.each:
            _write_rules(folder / PLACE / "rules", rules)
        for name in run.bank.active:
            formats.save(run.model, folder / PLACE / "adapters" / name, name)

    def on_train_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """`finish`."""
        rules, run = self._going()
        run.step = state.global_step
        rules.finish(run)
        for hook in self._still:
            hook.remove()
        made = _MADE.get(run.optimizer)
        if made:
            made.driven = False

    def _going(self) -> tuple[Rules, TrainRun]:
        if self._rules is None or self._run is None:
            raise StateError("RankloomCallback was added after training had begun: pass it to the Trainer")
        return self._rules, self._run

    def _finite(self, optimizer: Any) -> bool:
        """False for a step that the gradient scaler leaves out because its gradients overflowed."""
        _, run = self._going()
        scaled = getattr(optimizer, "scaler", None) is not None
        return not scaled or bool(torch.isfinite(guard.total_norm(run.parameters)))


@functools.cache
def _callback() -> type[RuleDriver]:
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingExtra("transformers", "hf", "RankloomCallback") from error
    body = {"__doc__": RuleDriver.__doc__, "__module__": __name__}
    return type("RankloomCallback", (RuleDriver, TrainerCallback), body)


def __getattr__(name: str) -> Any:
    if name == "RankloomCallback":
        return _callback()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _bank(model: nn.Module) -> Bank:
    bank = bank_or_none(model)
    if bank is None:
        raise StateError(f"this {type(model).__name__} has no adapters: rankloom.attach(model, …) before the Trainer")
    return bank


def _plain(optimizer: Any) -> Optimizer:
    """The optimizer behind accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(inner, Optimizer)
    return inner


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _check_groups(rules: Rules, made: _Made | None) -> None:
    """Every rule that shapes the optimizer's groups was there when the optimizer was made."""
    known = {type(rule) for rule in made.rules.each} if made else set()
    for rule in rules.each:
        if type(rule).groups is not Rule.groups and type(rule) not in known:
            raise SettingsError(
                f"{rule!r} changes the optimizer's groups: Trainer(optimizers=(optimizer_for(model, lr=…, "
                f"rules=[{type(rule).__name__}(…)]), None))"
            )


def _check_adds(rules: Rules, run: TrainRun) -> None:
    """A rule may add to the loss; one that scales or replaces it would do nothing here."""
    for rule in rules.each:
        if type(rule).loss is Rule.loss:
            continue
        found = []
        for value in (1.0, 2.0):
            with torch.no_grad(), torch.random.fork_rng(enabled=True):
                found.append(float(rule.loss(run, torch.tensor(value, device=run.device))))
        if abs(found[1] - found[0] - 1) > 1e-3:
            raise SettingsError(
                f"{type(rule).__name__} does more to the loss than adding to it, which a Trainer's callback cannot do: "
                "train with rankloom.fit"
            )


def _add_penalties(rules: Rules, run: TrainRun) -> None:
    if not rules.uses("loss"):
        return
    with torch.enable_grad():
        penalty = rules.loss(run, torch.zeros((), device=run.device))
    if not penalty.requires_grad:
        return
    parameters = list(dict.fromkeys(run.parameters.values()))
    for parameter, change in zip(parameters, torch.autograd.grad(penalty, parameters, allow_unused=True)):
        if change is not None:
            parameter.grad = change if parameter.grad is None else parameter.grad.add_(change)


def _evaluating(module: nn.Module, args: Any) -> None:
    """Statistics of the frozen base must not move in training."""
    module.training = False


def _write_rules(folder: Path, rules: Rules) -> None:
    tensors: dict[str, Tensor] = {}
    data = pack(rules.state(), tensors)
    files = {"rules.json": as_json(data), "rules.safetensors": to_bytes(tensors)}
    write_folder(folder, sealed(files, {"kind": KIND}))


def _read_rules(folder: Path, rules: Rules, device: torch.device) -> list[dict[str, Any]]:
    if not folder.is_dir():
        raise FileError(
            f"{folder}: the run is resumed, but there is no memory of the rules "
            f"{', '.join(type(rule).__name__ for rule in rules.each)}; name the Trainer's checkpoint that has it: "
            "RankloomCallback(resume_from=…)"
        )
    _, files = read_folder(folder, KIND)
    data, tensors = json.loads(files["rules.json"]), from_bytes(files["rules.safetensors"])
    state: list[dict[str, Any]] = unpack(data, tensors, device, keep_cpu=False)
    rules.check(state)
    return state
