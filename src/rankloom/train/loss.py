"""What a model makes of a batch: its loss, and how much the batch counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.errors import DataError, SettingsError
from rankloom.train.modes import mode
from rankloom.train.processes import Processes
from rankloom.train.rng import untouched_rng

Loss = Callable[[nn.Module, Any], Tensor]
IGNORED = -100


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """A mapping: `model(**batch).loss`. A tuple: the model on all but the last, against the last: cross entropy where
    that holds integers (classes in the output's last dim), mean squared error where it holds floats.
    """
    if isinstance(batch, Mapping):
        return _of_output(model, model(**batch))
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        *inputs, target = batch
        out = model(*inputs)
        if isinstance(out, Tensor) and isinstance(target, Tensor):
            if target.is_floating_point():
                return F.mse_loss(out, target.to(out.dtype))
            return F.cross_entropy(out.reshape(-1, out.shape[-1]).float(), target.reshape(-1))
    raise SettingsError(
        f"no loss is known for {type(model).__name__} on a batch that is a {type(batch).__name__}: "
        "give loss=lambda model, batch: …"
    )


def _of_output(model: nn.Module, out: Any) -> Tensor:
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if loss is None and isinstance(out, Tensor) and out.ndim == 0:
        loss = out
    if not isinstance(loss, Tensor):
        raise SettingsError(
            f"{type(model).__name__} gave no loss for this batch: put 'labels' into it, or give "
            "loss=lambda model, batch: …"
        )
    return loss


Weigh = Callable[[Any], int]
"""How many terms the loss of a batch averages over; 0: there is nothing to predict in it."""


def one(batch: Any) -> int:
    """Every batch counts the same: all that is known of a loss that was given."""
    return 1


def count(batch: Any, first: bool = True) -> int:
    """How many labels (a mapping's `labels`, a tuple's last) are not −100, those of floats all; 1 where there are none.

    `first`: whether the first column of `labels` (batch, time) counts too; it does not where a model predicts each
    token from the ones before.
    """
    labels = _labels(batch)
    if labels is None:
        return 1
    if labels.is_floating_point():
        return labels.numel()
    return int(((labels if first or labels.ndim < 2 else labels[:, 1:]) != IGNORED).sum())


def _labels(batch: Any) -> Tensor | None:
    found = batch.get("labels") if isinstance(batch, Mapping) else None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[-1]
    return found if isinstance(found, Tensor) else None


class Terms:
    """How many terms `default_loss` averages over, so that unequal batches weigh as one big batch would.

    Whether the model passes over the first column of labels (a causal one does; an encoder-decoder, a masked language
    model or a tagger does not) is asked of the model itself, once: its loss where the first column alone has labels.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._first: bool | None = None

    def __call__(self, batch: Any) -> int:
        labels = _labels(batch)
        if self._first is None and isinstance(batch, Mapping) and labels is not None and _by_time(labels):
            self._first = self._counts_first(batch, labels)
        return count(batch, self._first is not False)

    def _counts_first(self, batch: Mapping[str, Any], labels: Tensor) -> bool:
        none = torch.full_like(labels, IGNORED)
        only = none.clone()
        valid = labels[labels != IGNORED]
        only[:, 0] = valid[0] if valid.numel() else 0
        device = next(self.model.parameters()).device
        with untouched_rng(), mode(self.model, False), torch.no_grad():
            found = float(default_loss(self.model, move({**batch, "labels": only}, device)))
            if not math.isfinite(found):
                return False
            return found != float(default_loss(self.model, move({**batch, "labels": none}, device)))


def _by_time(labels: Tensor) -> bool:
    return labels.ndim > 1 and not labels.is_floating_point()


def shares(batches: Sequence[Any], weigh: Weigh, processes: Processes) -> list[float]:
    """What each of the batches of one step contributes to its loss; over all processes they add up to 1.

    Raises:
        DataError: no batch of the step has anything to predict.
    """
    counts = [weigh(batch) for batch in batches]
    total, number = processes.sum(sum(counts), len(batches))
    if not total:
        raise DataError(
            f"there is no label to train on in a whole step ({int(number)} batches, every label is {IGNORED}): "
            "leave such batches out, raise accumulate or batch_size, or look at how the labels are made"
        )
    return [c / total for c in counts]


def labelled(batch: Any) -> Any:
    """The batch with a class in the place of every −100, so that its loss is finite where there was nothing to say."""
    labels = _labels(batch)
    if labels is None:
        return batch
    if isinstance(batch, Mapping):
        return {**batch, "labels": labels.clamp(min=0)}
    return type(batch)([*batch[:-1], labels.clamp(min=0)])


def tokens(batch: Any) -> int:
    """Tokens in a batch or in those of named streams, without padding where a mask tells; 0 where there are none."""
    if not isinstance(batch, Mapping):
        return 0
    if all(isinstance(one, Mapping) for one in batch.values()):
        return sum(map(tokens, batch.values()))
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.sum())
    return ids.numel() if isinstance(ids, Tensor) else 0


def move(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {k: move(v, device) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        moved = [move(v, device) for v in batch]
        return moved if isinstance(batch, list) else tuple(moved)
    return batch
