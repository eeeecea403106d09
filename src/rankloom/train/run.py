"""The run that rules see, and which tensors train in it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rankloom.core.bank import Bank
from rankloom.core.notes import Notes
from rankloom.core.slots import slot_table
from rankloom.errors import SettingsError, StateError


@dataclass
class TrainRun:
    """One training, whoever drives it: model, bank, optimizer and where it stands.

    `step`: optimizer steps done so far; `parameters`: the tensors that train, by key; `device`: where batches go.
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
        """The model's output for `batch` with these adapters active, the base alone without any."""
        with self.bank.using(*names):
            return self.model(**batch) if isinstance(batch, Mapping) else self.model(*batch)

    def replace(self, parameter: nn.Parameter, new: torch.Tensor) -> nn.Parameter:
        """Put a tensor of another shape in the place of a trained parameter."""
        raise NotImplementedError

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, once it is built (after every rule's `groups`)."""
        if self._optimizer is None:
            raise StateError("the optimizer is built after `groups`: use it from `start` on")
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer


def bank_or_none(model: nn.Module) -> Bank | None:
    """The model's bank, if it has one."""
    found = getattr(model, "rankloom", None)
    return found if isinstance(found, Bank) else None


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
    found = {key: parameter for key, parameter, _ in bank.trainable()}
    if not found:
        raise SettingsError(f"nothing in {', '.join(map(repr, bank.active))} is trainable: all its tensors are frozen")
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
        for parameter, flag in flags:
            parameter.grad = None
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode inside the block; each module's own mode is put back after.

    With adapters, normalisations whose running statistics belong to the frozen base stay in evaluation mode: in
    training mode they would change the base.
    """
    before = [(m, m.training) for m in model.modules()]
    try:
        model.train(training)
        if training and bank_or_none(model) is not None:
            for module in model.modules():
                if base_statistics(module):
                    module.training = False
        yield
    finally:
        for module, was in before:
            module.training = was


def base_statistics(module: nn.Module) -> bool:
    """True for a normalisation with running statistics that no adapter owns."""
    return module._buffers.get("running_mean") is not None and not slot_table(module, "running_mean")


@contextmanager
def checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing of the model inside the block, if wanted."""
    if not wanted or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is None:
        raise SettingsError(
            f"gradient_checkpointing=True: {type(model).__name__} has no gradient_checkpointing_enable(); "
            "wrap its blocks in torch.utils.checkpoint yourself, or leave the setting out"
        )
    enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _call(model, "enable_input_require_grads")
    try:
        yield
    finally:
        _call(model, "gradient_checkpointing_disable")
        _call(model, "disable_input_require_grads")


def _call(model: nn.Module, method: str) -> Any:
    found = getattr(model, method, None)
    return None if found is None else found()


@contextmanager
def selection_for_all_threads(model: nn.Module) -> Iterator[None]:
    """Who speaks here and now speaks in the backward pass's own threads too, inside the block."""
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
