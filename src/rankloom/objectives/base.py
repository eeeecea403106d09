"""An objective: the loss of one step, from one batch of each named stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.errors import SettingsError, suggest
from rankloom.settings import Settings

IGNORED = -100
Batch = Mapping[str, Any]


class Objective(Settings, ABC):
    """Called as `objective(model, streams)` with {stream name: batch}; returns the loss, 0-d.

    Batches are mappings as causal language models take them: `labels` (batch, tokens) beside `input_ids`, −100 where
    nothing is to be predicted; label t is predicted from the tokens before t.
    """

    @abstractmethod
    def __call__(self, model: nn.Module, streams: Mapping[str, Batch]) -> Tensor:
        """The loss."""


def stream(streams: Mapping[str, Batch], name: str) -> Batch:
    """The batch of the stream `name`. Raises `SettingsError` with the streams that there are."""
    if name not in streams:
        there = ", ".join(map(repr, streams)) or "none"
        raise SettingsError(
            f"the objective reads the stream {name!r}; there is {there}{suggest(name, list(streams))}: "
            f"fit(model, {{{name!r}: batches, …}}, loss=…)"
        )
    return streams[name]


def part(batch: Batch, name: str) -> dict[str, Any]:
    """The columns `name_…` of a batch, without the prefix: "chosen_input_ids" is `input_ids` of the part "chosen"."""
    found = {key.removeprefix(f"{name}_"): value for key, value in batch.items() if key.startswith(f"{name}_")}
    if not {"input_ids", "labels"} <= found.keys():
        raise SettingsError(
            f"the batch has no columns '{name}_input_ids' and '{name}_labels'; it has {', '.join(map(repr, batch))}"
        )
    return found


def answer(model: nn.Module, batch: Batch) -> Tensor:
    """The logits (batch, tokens, vocabulary) for a batch; no loss is computed."""
    logits: Tensor = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    return logits


def token_log_probs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(log p(label) in float32, 0 where there is none; whether there is one), both (batch, tokens − 1)."""
    labels = labels[:, 1:].to(logits.device)
    mask = labels != IGNORED
    found = logits[:, :-1].float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return torch.where(mask, found, 0.0), mask


def log_probs(logits: Tensor, labels: Tensor, mean: bool = False) -> Tensor:
    """Σ log p over the labels of each row, or their mean; (batch,)."""
    each, mask = token_log_probs(logits, labels)
    total = each.sum(-1)
    return total / mask.sum(-1).clamp(min=1) if mean else total


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of −log p over all labels of the batch, 0-d."""
    each, mask = token_log_probs(logits, labels)
    return -each.sum() / mask.sum().clamp(min=1)
