"""The rules' `loss` inside a Trainer: what the model's forward returns, changed while the graph is alive."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rankloom.errors import SettingsError, StateError
from rankloom.train.loss import IGNORED
from rankloom.train.ruleset import RuleSet
from rankloom.train.run import TrainRun

OF_TRAINERS = ("num_items_in_batch", "fused_lm_head", "shift_labels")
"""Keywords that trainers call a model with, and that are no columns of the batch."""


class Losses:
    """A hook on the model that puts `rules.loss` into the loss of each training pass; evaluation is left alone.

    Two kinds of output hold a loss: one with `loss`, which transformers' Trainer takes as it is, and TRL's SFTTrainer's
    `log_probs` by token, whose negative mean is the loss. Both may stand for a share of an accumulated batch (they are
    divided by `num_items_in_batch`): rules see the mean of the pass, and what they make of it counts by that share.

    Raises:
        SettingsError: at a pass whose output holds no loss (label smoothing, `compute_loss_func`, other trainers).
        StateError: by `check`, where the Trainer took its gradients from another loss.
    """

    def __init__(self, rules: RuleSet, run: TrainRun, args: Any) -> None:
        self.rules = rules
        self.run = run
        self.by_token = getattr(args, "loss_type", None) == "nll"
        self.shifts = shifts_labels(run.model)
        self._used = False
        self._hooks = [
            run.model.register_forward_pre_hook(self._before, with_kwargs=True),
            run.model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def check(self) -> None:
        """Before a step: the loss of some pass was the one that gradients came from."""
        if not self._used:
            raise StateError(
                f"{self._names}: the Trainer's loss is not the one that the model returned, so the rules' part of it "
                "is lost: train with rankloom.fit, or leave the rules out"
            )

    def close(self) -> None:
        """Leave the model as it was."""
        self.run.passed()
        for hook in self._hooks:
            hook.remove()

    @property
    def _names(self) -> str:
        return ", ".join(type(rule).__name__ for rule in self.rules.each if self.rules.changes_loss(rule))

    def _mine(self, model: nn.Module) -> bool:
        return model.training and self.run.in_pass

    def _before(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if self._mine(model):
            self.run.batch = {k: v for k, v in kwargs.items() if k not in OF_TRAINERS} if kwargs else args
            self.run.opened()

    def _after(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        if not self._mine(model):
            return None
        try:
            self.run.answered(output)
            return self._changed(output, kwargs)
        finally:
            self.run.passed()

    def _changed(self, output: Any, kwargs: Mapping[str, Any]) -> Any:
        loss, log_probs = _loss(output), _field(output, "log_probs")
        if log_probs is None and isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad:
            share = self._share(kwargs)
            if not share:
                return _with(output, "loss", self._seen(loss))
            full = self.rules.loss(self.run, loss if share == 1 else loss / share)
            return _with(output, "loss", self._seen(full if share == 1 else full * share))
        if self.by_token and isinstance(log_probs, Tensor):
            mask = _field(output, "label_mask")
            mean = -log_probs.sum() / mask.sum().clamp(min=1)
            added = self.rules.loss(self.run, mean) - mean
            return _with(output, "log_probs", self._seen(log_probs - added * mask.to(log_probs.dtype)))
        raise SettingsError(
            f"{self._names} changes the loss, and this Trainer makes its loss outside the model (label smoothing, "
            "compute_loss_func, a loss_type of its own, or batches without labels): leave that out, or train with "
            "rankloom.fit(…, loss=…)"
        )

    def _share(self, kwargs: Mapping[str, Any]) -> Any:
        """What this pass is of the accumulated batch that its loss was divided by; 1 where it is a mean of its own."""
        number, labels = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels", kwargs.get("labels"))
        if number is None or not isinstance(labels, Tensor):
            return 1
        if "shift_labels" not in kwargs and self.shifts:
            labels = labels[..., 1:]
        mine = (labels != IGNORED).sum()
        return 1 if mine == number else mine / number

    def _seen(self, tensor: Tensor) -> Tensor:
        """Hear whether gradients come through here."""
        if tensor.requires_grad:
            tensor.register_hook(self._use)  # type: ignore[no-untyped-call]
        return tensor

    def _use(self, gradient: Tensor) -> None:
        self._used = True


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's loss predicts each token from those before it, so that the first label is of nothing."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss and not encodes


def _loss(output: Any) -> Any:
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return output[0] if output else None
    return _field(output, "loss")


def _field(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _with(output: Any, name: str, value: Tensor) -> Any:
    if isinstance(output, tuple):
        return (value, *output[1:])
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, **{name: value})
    output[name] = value
    return output
