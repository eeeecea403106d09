"""Rules inside transformers' `Trainer` and TRL's `SFTTrainer`: one optimizer factory and one callback.

    optimizer = optimizer_for(model, lr=1e-3, rules=[LoRAPlus(ratio=16)])
    Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[RankloomCallback()]).train()

The hooks are those of `rankloom.fit`, in the same order. What the Trainer makes different:

- It clips before its callbacks hear of the gradients: rules see clipped ones, and what they change is clipped again.
- A rule's `loss` changes the loss that the model's forward returns, while the graph is alive, in training passes only
  (`hf/losses.py`): the Trainer logs the loss with it. A loss that is made outside the model is refused.
- Nobody but the user can add the callback: an optimizer of `optimizer_for` refuses to step while rules have hooks and
  no callback drives them. A Trainer with neither is warned in its second step (`core/undriven.py`).
"""

from __future__ import annotations

import functools
import inspect
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
from rankloom.core.fuse import known_groups, recall_groups
from rankloom.core.notes import Notes
from rankloom.core.rule import Rule
from rankloom.core.undriven import DRIVEN
from rankloom.errors import FileError, MissingExtra, SettingsError, StateError
from rankloom.files.folders import read_folder, write_folder
from rankloom.files.manifest import sealed
from rankloom.files.strict import as_json
from rankloom.hf.losses import Losses
from rankloom.train import guard
from rankloom.train.columns import Columns
from rankloom.train.modes import bank_or_none, base_statistics
from rankloom.train.ruleset import RuleSet
from rankloom.train.run import TrainRun, trainable
from rankloom.train.serialise import pack, unpack

PLACE = "rankloom"
"""Folder inside a Trainer's checkpoint: `rules/` and `adapters/<name>/`."""
KIND = "rankloom-rules"


@dataclass
class _Made:
    """What `optimizer_for` knows of an optimizer: its rules, and whether a callback drives them."""

    rules: RuleSet
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
    driver = RuleSet(bank, rules)
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
        context: columns of each batch that gates are told; the model itself gets them only where its forward names
            them. A Trainer drops what the model does not name, unless `remove_unused_columns=False`.
    """

    def __init__(
        self,
        rules: Iterable[Rule] = (),
        resume_from: str | Path | None = None,
        context: Iterable[str] = (),
    ) -> None:
        self.passed = tuple(rules)
        self.resume_from = None if resume_from is None else Path(resume_from)
        self.context = tuple(context)
        self._rules: RuleSet | None = None
        self._run: TrainRun | None = None
        self._reached = guard.Reached("error")
        self._losses: Losses | None = None
        self._told: Columns | None = None
        self._rates: list[Any] = []
        self._still: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """`start`, and on a resumed run `restore`."""
        model, optimizer = trainer["model"], _plain(trainer["optimizer"])
        bank, made = _bank(model), _MADE.get(optimizer)
        rules = RuleSet(bank, (*(made.rules.each if made else ()), *self.passed))
        _check_groups(rules, made)
        parameters = trainable(model)
        device = next(iter(parameters.values())).device
        self._release()
        notes = Notes(rules.reads)
        run = TrainRun(model, state.max_steps, parameters, step=state.global_step, device=device, notes=notes)
        run.optimizer = optimizer
        rules.start(run)
        run.adopt()
        if state.global_step:
            folder = (self.resume_from or _checkpoint(args, state)) / PLACE / "rules"
            if rules.each or folder.is_dir():
                memory, groups = _read_rules(folder, rules, device)
                rules.restore(memory)
                recall_groups(model, groups)
        self._rules, self._run, self._reached = rules, run, guard.Reached("error")
        self._still = [m.register_forward_pre_hook(_evaluating) for m in model.modules() if base_statistics(m)]
        self._losses = Losses(rules, run, args) if rules.uses("loss") else None
        if self.context:
            self._told = Columns(model, bank.selector, self.context, lambda: run.in_pass)
        if made:
            made.driven = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """`before_step`, and the learning rates times `rate`."""
        rules, run = self._going()
        run.step = state.global_step
        rules.before_step(run)
        run.adopt()
        factor = rules.rate(run)
        if factor != 1:
            self._rates = [group["lr"] for group in run.optimizer.param_groups]
            for group in run.optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """`after_backward`, and clipping once more if it changed a gradient."""
        rules, run = self._going()
        if self._told is not None:
            self._told.settle()
        if not self._reached.settled:
            self._reached.look(run.parameters, last=run.step + 1 >= run.total_steps)
        if self._losses is not None:
            self._losses.check()
        if not self._finite(trainer["optimizer"]):
            return
        rules.after_backward(run)
        if args.max_grad_norm and rules.uses("after_backward"):
            guard.scale_gradients(run.parameters, float(guard.total_norm(run.parameters)), args.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """`after_step`; the gradients are still there. The scheduler gets its own rates back and logs the real one."""
        rules, run = self._going()
        if self._finite(trainer["optimizer"]):
            rules.after_step(run)
            run.adopt()
        schedule = getattr(trainer["lr_scheduler"], "scheduler", trainer["lr_scheduler"])
        if self._rates and not reads_groups(schedule):
            schedule._last_lr = [group["lr"] for group in run.optimizer.param_groups]
            self._give_back_rates()

    def on_step_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """Rates that are logged from the groups themselves are given back here."""
        self._give_back_rates()

    def _give_back_rates(self) -> None:
        _, run = self._going()
        for group, lr in zip(run.optimizer.param_groups, self._rates):
            group["lr"] = lr
        self._rates = []

    def on_save(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """The rules' memory and each active adapter, into the Trainer's own checkpoint."""
        if not state.is_world_process_zero:
            return
        from rankloom import formats

        rules, run = self._going()
        folder = _checkpoint(args, state)
        if not folder.is_dir():
            raise StateError(f"{folder}: no checkpoint of the Trainer there to write the rules' memory into")
        _write_rules(folder / PLACE / "rules", rules, known_groups(run.model))
        for name in run.bank.active:
            formats.save(run.model, folder / PLACE / "adapters" / name, name)

    def on_train_end(self, args: Any, state: Any, control: Any, **trainer: Any) -> None:
        """`finish`."""
        rules, run = self._going()
        run.step = state.global_step
        rules.finish(run)
        self._release()
        made = _MADE.get(run.optimizer)
        if made:
            made.driven = False

    def _release(self) -> None:
        """Take off what hangs on the model, after this training or one that broke off."""
        for part in (self._losses, self._told):
            if part is not None:
                part.close()
        for hook in self._still:
            hook.remove()
        self._losses, self._told, self._still = None, None, []

    def _going(self) -> tuple[RuleSet, TrainRun]:
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


def _check_groups(rules: RuleSet, made: _Made | None) -> None:
    """Every rule that shapes the optimizer's groups was there when the optimizer was made."""
    known = {type(rule) for rule in made.rules.each} if made else set()
    for rule in rules.each:
        if type(rule).groups is not Rule.groups and type(rule) not in known:
            raise SettingsError(
                f"{rule!r} changes the optimizer's groups: Trainer(optimizers=(optimizer_for(model, lr=…, "
                f"rules=[{type(rule).__name__}(…)]), None))"
            )


def reads_groups(schedule: Any) -> bool:
    """Whether a Trainer logs the rates of this scheduler from the optimizer's groups: it steps on a metric."""
    return "metrics" in inspect.signature(schedule.step).parameters


def _evaluating(module: nn.Module, args: Any) -> None:
    """Statistics of the frozen base must not move in training."""
    module.training = False


def _write_rules(folder: Path, rules: RuleSet, groups: dict[str, Any]) -> None:
    """The rules' memory, and what layers have learnt of groups, without which a resumed run rounds otherwise."""
    tensors: dict[str, Tensor] = {}
    data = pack(rules.state(), tensors)
    files = {"rules.json": as_json(data), "rules.safetensors": to_bytes(tensors), "groups.json": as_json(groups)}
    write_folder(folder, sealed(files, {"kind": KIND}))


def _read_rules(folder: Path, rules: RuleSet, device: torch.device) -> tuple[list[dict[str, Any]], dict[str, Any]]:
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
    return state, json.loads(files["groups.json"])
