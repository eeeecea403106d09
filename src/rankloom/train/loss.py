"""What a model makes of a batch: its loss, and how much the batch counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.errors import SettingsError
from rankloom.train.processes import Processes

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


def count(batch: Any) -> int:
    """How many terms the default loss averages over, so that unequal batches weigh as one big batch would.

    Labels other than −100 where the batch has them; beside `input_ids` of the same shape the first column does not
    count, since a causal model predicts from the token before. Without labels every batch counts 1.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return 1
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.shape == labels.shape and labels.ndim > 1:
        labels = labels[..., 1:]
    return int((labels != IGNORED).sum())


def shares(batches: Sequence[Any], counted: bool, processes: Processes) -> list[float]:
    """What each of the batches of one step contributes to its loss; over all processes they add up to 1."""
    counts = [count(b) for b in batches] if counted else [1] * len(batches)
    total, number = processes.sum(sum(counts), len(batches))
    return [c / total for c in counts] if total else [1 / number] * len(batches)


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
