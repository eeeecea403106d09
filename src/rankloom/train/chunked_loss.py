"""The loss of a causal language model by chunks of tokens: its (tokens, vocabulary) logits never exist."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rankloom.errors import SettingsError
from rankloom.ops.chunked import chunked_cross_entropy
from rankloom.train.loss import IGNORED, Loss, default_loss
from rankloom.train.modes import bank_or_none
from rankloom.train.settings import TrainSettings

PLAIN = "ForCausalLMLoss"
"""The loss function of transformers that this one stands for."""
CHANGES = ("final_logit_softcapping", "logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
"""Settings by which models of transformers change the logits behind the head; only named, never relied upon."""


@dataclass(frozen=True)
class ChunkedLoss:
    """`default_loss` with the same value and gradients, the head and the cross entropy taken `chunk` tokens at a time.

    The model's own forward runs, with a head that hands its input on and a loss function that applies the true head
    to the tokens that have a label. So sharded bases, packed, tied and adapted heads work as they do without chunks.

    Raises:
        SettingsError: the batch is no mapping with labels, or this model's loss is not the cross entropy of its
            head's output (logits capped or scaled, a loss of its own).
    """

    chunk: int

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, Mapping) or "labels" not in batch:
            raise SettingsError(
                "chunked_loss needs batches that are mappings with 'labels', as causal models take them"
            )
        head = _head(model)
        _check(model)
        with _handing_on(head) as (real, seen), _own_loss(model) as call:
            call.into = lambda logits, labels, terms: self._of(model, real, seen, logits, labels, terms)
            loss = default_loss(model, batch)
        if not call.count:
            raise _refused(model, "does not take its loss from model.loss_function")
        return loss

    def _of(
        self, model: nn.Module, head: Any, seen: list[Tensor], logits: Tensor, labels: Tensor, terms: Any
    ) -> Tensor:
        """The loss for labels that are shifted already."""
        hidden = seen[-1]
        if logits is not hidden and not (
            logits.shape == hidden.shape and torch.equal(logits.detach().to(hidden.dtype), hidden.detach())
        ):
            raise _refused(model, "changes its logits between head and loss")
        labels = labels.reshape(-1).to(hidden.device)
        picked = (labels != IGNORED).nonzero().squeeze(-1)
        return chunked_cross_entropy(
            head,
            hidden.reshape(-1, hidden.shape[-1]).index_select(0, picked),
            labels.index_select(0, picked),
            [p for p in model.parameters() if p.requires_grad],
            chunk=self.chunk,
            terms=terms,
        )


def loss_of_batches(settings: TrainSettings) -> Loss:
    """What a run takes from a batch where it is given no loss of its own."""
    return default_loss if settings.chunked_loss is None else ChunkedLoss(settings.chunked_loss)


class _Call:
    """Stands for the model's loss function: shifts labels as that does, and passes them on."""

    def __init__(self) -> None:
        self.count = 0
        self.into: Any = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int = IGNORED,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        self.count += 1
        if shift_labels is None:
            shift_labels = pad(labels, (0, 1), value=IGNORED)[..., 1:]
        found: Tensor = self.into(
            logits, shift_labels.masked_fill(shift_labels == ignore_index, IGNORED), num_items_in_batch
        )
        return found


def _head(model: nn.Module) -> nn.Module:
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if not isinstance(head, nn.Module) or not hasattr(model, "loss_function"):
        raise _refused(model, "has no output head over a vocabulary (get_output_embeddings)")
    return head


def _check(model: nn.Module) -> None:
    name = getattr(model.loss_function, "__name__", type(model.loss_function).__name__)
    if name != PLAIN:
        raise _refused(model, f"has the loss function {name}, not {PLAIN}")
    bank = bank_or_none(model)
    by_row = [n for n, w in bank.active.items() if isinstance(w, Tensor) and w.ndim] if bank is not None else []
    if by_row:
        raise SettingsError(f"chunked_loss: adapter {by_row[0]!r} has a weight for each row, and chunks mix rows")


def _refused(model: nn.Module, why: str) -> SettingsError:
    config = getattr(model, "config", None)
    known = [f" ({n}={v})" for n in CHANGES if (v := getattr(config, n, None)) not in (None, 1)]
    return SettingsError(
        f"chunked_loss: {type(model).__name__} {why}{''.join(known[:1])}, so its loss cannot be taken by chunks: "
        "leave chunked_loss out, or give loss=…"
    )


@contextmanager
def _handing_on(head: nn.Module) -> Iterator[tuple[Any, list[Tensor]]]:
    """The head hands its input on inside the block; gives the true forward and what it was called with."""
    own, real, seen = head.__dict__.get("forward"), head.forward, []

    def forward(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    head.forward = forward
    try:
        yield real, seen
    finally:
        del head.forward
        if own is not None:
            head.forward = own


@contextmanager
def _own_loss(model: Any) -> Iterator[_Call]:
    call, own = _Call(), model.__dict__.get("_loss_function")
    model.loss_function = call
    try:
        yield call
    finally:
        del model._loss_function
        if own is not None:
            model.loss_function = own
