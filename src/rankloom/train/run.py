"""The run that rules see, and which tensors train in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rankloom.core.bank import Bank
from rankloom.core.notes import Notes
from rankloom.errors import SettingsError, StateError
from rankloom.optim.state import exchange
from rankloom.train.loss import move
from rankloom.train.modes import bank_or_none


@dataclass
class TrainRun:
    """One training, whoever drives it: model, bank, optimizer and where it stands.

    `step`: optimizer steps done so far; `parameters`: the tensors that train, by key; `device`: where batches go;
    `batch`, `output`, `notes`: of the forward pass that `Rule.loss` is called for, empty outside of it.
    `bank` and `optimizer` raise `StateError` where there is none (yet).
    """

    model: nn.Module
    total_steps: int
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    step: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch: Any = None
    output: Any = None
    notes: Notes = field(default_factory=Notes)
    _optimizer: torch.optim.Optimizer | None = None
    _aside: int = 0

    @property
    def bank(self) -> Bank:
        """The model's bank."""
        found = bank_or_none(self.model)
        if found is None:
            raise StateError(
                f"this {type(self.model).__name__} has no adapters, and a rule asks for them: "
                "rankloom.attach(model, …) first, or leave the rule out"
            )
        return found

    def forward(self, batch: Any, *names: str) -> Any:
        """The model's output for `batch` with these adapters active, the base alone without any.

        A mapping goes in as keywords; of a tuple all but its last, the target; anything else alone. The model's mode
        and gradients are as they are here. Where layers are checkpointed by code that `fit` has not switched on, ask
        for it without gradients.
        """
        selector = self.bank.selector
        notes, selector.notes = selector.notes, None
        self._aside += 1
        try:
            with self.bank.using(*names, context=selector.current().context):
                return _called(self.model, move(batch, self.device))
        finally:
            self._aside -= 1
            selector.notes = notes

    @property
    def in_pass(self) -> bool:
        """Whether a call of the model is a driver's own, with a backward pass to come, and not `forward`'s."""
        return not self._aside and torch.is_grad_enabled()

    @contextmanager
    def watched(self, batch: Any, answers: bool) -> Iterator[None]:
        """The forward pass of a batch and what rules add to its loss: inside, `batch` is known, and with `answers` the
        output and the notes of the last call of the model.
        """
        self.batch = batch
        hooks: list[Any] = []
        if answers:
            hooks.append(self.model.register_forward_pre_hook(lambda *_: self.opened()))
            hooks.append(self.model.register_forward_hook(lambda model, args, output: self.answered(output)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.passed()

    def opened(self) -> None:
        """A call of the model begins: what is noted from here on is of this call."""
        bank = bank_or_none(self.model)
        if self.in_pass and bank is not None:
            self.notes.clear()
            bank.selector.notes = self.notes if self.notes.kinds else None

    def answered(self, output: Any) -> None:
        """A call of the model has given `output`."""
        if self.in_pass:
            self.output = output

    def passed(self) -> None:
        """The rules have seen the pass; recomputation in the backward pass notes nothing."""
        bank = bank_or_none(self.model)
        if bank is not None:
            bank.selector.notes = None
        self.notes.clear()
        self.batch = self.output = None

    def replace(self, parameter: nn.Parameter, new: Tensor, kept: tuple[int, Tensor] | None = None) -> nn.Parameter:
        """Put a tensor of another shape in the place of a trained parameter: in every module that has it, in
        `parameters` and in the optimizer. Its gradient is dropped.

        `kept`: (dim, indices) of `parameter` that `new` consists of: the optimizer's memory of them stays. Otherwise it
        starts anew. Raises `StateError` for a tensor that no module of the model has.
        """
        made = nn.Parameter(new.detach(), requires_grad=parameter.requires_grad)
        homes = [(m, name) for m in self.model.modules() for name, p in m._parameters.items() if p is parameter]
        if not homes:
            raise StateError(
                f"a tensor {tuple(parameter.shape)} to be replaced is in no module of this "
                f"{type(self.model).__name__}: take it from run.parameters or run.bank, as it is now"
            )
        for module, name in homes:
            module._parameters[name] = made
        self.take_over(parameter, made, kept)
        return made

    def take_over(self, old: nn.Parameter, new: nn.Parameter, kept: tuple[int, Tensor] | None = None) -> None:
        """`new` stands in the model where `old` was: so it does in `parameters` and in the optimizer."""
        for key, parameter in self.parameters.items():
            if parameter is old:
                self.parameters[key] = new
        if self._optimizer is not None:
            exchange(self._optimizer, old, new, kept)

    def adopt(self) -> None:
        """Count tensors that rules have given the optimizer among `parameters`: by their key in the bank, or by their
        place in the optimizer.
        """
        known = {id(p) for p in self.parameters.values()}
        bank = bank_or_none(self.model)
        for number, group in enumerate(self.optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                if id(parameter) not in known:
                    keys = {} if bank is None else {id(p): key for key, p, _ in bank.trainable()}
                    self.parameters[keys.get(id(parameter), f"optimizer/{number}.{place}")] = parameter

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, once it is built (after every rule's `groups`)."""
        if self._optimizer is None:
            raise StateError("the optimizer is built after `groups`: use it from `start` on")
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer


def _called(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*(batch[:-1] if len(batch) > 1 else batch))
    return model(batch)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors that a run trains: those of the active adapters, or without a bank all that require gradients."""
    bank = bank_or_none(model)
    if bank is None:
        found = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not found:
            raise SettingsError(f"no parameter of this {type(model).__name__} requires a gradient: nothing can train")
        return found
    if bank.merged:
        raise StateError(f"{', '.join(map(repr, bank.merged))} is merged into the base: bank.unmerge() before training")
    if not bank.active:
        raise StateError(f"no adapter is active, so none would train: bank.use({', '.join(map(repr, bank.names))})")
    found = {key: parameter for key, parameter, _ in bank.trainable()} if bank.trained else {}
    if not found:
        raise SettingsError(
            f"nothing that is active ({', '.join(map(repr, bank.active))}) is trained: its tensors are frozen, or "
            "bank.train(…) names others; bank.train() trains all that are active"
        )
    return found


@contextmanager
def only_these_train(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Gradients for the trainable tensors and for no other inside the block; flags and gradients are put back after."""
    chosen = trainable(model)
    mine = {id(p) for p in chosen.values()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    base = [n for n, p in model.named_parameters() if p.requires_grad and ".adapters." not in f".{n}"]
    extra = [n for n in base if not n.startswith("rankloom.")]
    if bank_or_none(model) is not None and extra:
        warnings.warn(
            f"{len(extra)} base tensors require gradients ({extra[0]!r} …) but stay frozen, because the model has "
            "adapters: name them in modules_to_save to train them",
            stacklevel=3,
        )
    try:
        for parameter, flag in flags:
            if flag != (id(parameter) in mine):
                parameter.requires_grad_(not flag)
            parameter.grad = None
        yield chosen
    finally:
        for parameter in chosen.values():
            parameter.grad = None
        for parameter, flag in flags:
            parameter.grad = None
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextmanager
def checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing of the model inside the block, if wanted."""
    if not wanted or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    enable = getattr(model, "gradient_checkpointing_enable", None)
    own = getattr(model, "enable_gradient_checkpointing", None)  # diffusers
    again = partial(checkpoint, use_reentrant=False, context_fn=_same_selection(model))
    if enable is not None:
        enable(gradient_checkpointing_kwargs=again.keywords)
    elif own is not None:
        own(gradient_checkpointing_func=lambda module, *args: again(module.__call__, *args))
    else:
        raise SettingsError(
            f"gradient_checkpointing=True: {type(model).__name__} has no gradient_checkpointing_enable() and no "
            "enable_gradient_checkpointing(); wrap its blocks in torch.utils.checkpoint yourself, or leave the setting "
            "out"
        )
    _call(model, "enable_input_require_grads")
    try:
        yield
    finally:
        _call(model, "gradient_checkpointing_disable" if enable is not None else "disable_gradient_checkpointing")
        _call(model, "disable_input_require_grads")


def _same_selection(model: nn.Module) -> Callable[[], tuple[Any, Any]]:
    """Layers that are computed again see the selection of their first pass, whatever is active by then."""
    bank = bank_or_none(model)
    if bank is None:
        return lambda: (nullcontext(), nullcontext())
    selector = bank.selector
    return lambda: (nullcontext(), selector.local(selector.current()))


def _call(model: nn.Module, method: str) -> Any:
    found = getattr(model, method, None)
    return None if found is None else found()


@contextmanager
def selection_for_all_threads(model: nn.Module) -> Iterator[None]:
    """Who is active here and now is active in the backward pass's own threads too, inside the block."""
    bank = bank_or_none(model)
    if bank is None:
        yield
        return
    before = bank.selector.default
    bank.selector.default = bank.selector.current()
    try:
        yield
    finally:
        bank.selector.default = before
