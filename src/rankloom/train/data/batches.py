"""Batches of tensors whose order is a function of (seed, epoch, index), so that a position needs no replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankloom.errors import DataError, SettingsError, StateError
from rankloom.train.data.deck import deck
from rankloom.train.data.examples import Example
from rankloom.train.data.masking import Masking
from rankloom.train.data.order import generator
from rankloom.train.data.prepare import Prepared
from rankloom.train.data.records import Where, fault

IGNORED = -100
Batch = dict[str, Tensor]
Augment = Callable[[Example, torch.Generator], Example]


class Batches:
    """Dict batches of a prepared data set; iterating gives the rest of the present epoch and moves on to the next.

    A batch of B rows padded to length L (right, to a multiple of `pad_to_multiple_of`, at most the data's
    `max_length`) holds int64 tensors: `input_ids` [B, L], `attention_mask` [B, L] (1: token, 0: padding) and `labels`,
    [B, L] with −100 where nothing is trained, or [B] class ids for a classification.

    With `packing=True` a row holds several whole examples, best fit up to `max_length`; `position_ids` [B, L] restart
    at 0 with each of them, and the first token of each has label −100, so none is predicted from its neighbour.
    Attention must honour `position_ids`: `fit` asks the model, and refuses one that does not. In transformers it does
    where `attention_mask` is absent and the model runs with `use_cache=False`; hence packed batches carry no mask
    (causal attention never looks at the padding on the right), and `fit` turns the cache off.

    Of several sources with ratios, an epoch has rows in these ratios, as many as the source that is used up first
    allows; the others go on in the next epoch where they stood, each in an order of its own.

    Steps are counted over all epochs: step `s` is batch `s % len(self)` of epoch `s // len(self)`. Each step takes the
    next `batch_size · world` rows of the epoch's order and deals them out to the ranks: disjoint, complete, the same
    number of steps for each rank. A last step too short to give every rank a row is joined to the one before.

    `augment(example, generator)` gives the example to train on, anew in each epoch. The generator is seeded by (seed,
    epoch, index of the example), so a resumed run draws what the run that was not interrupted drew, whatever the order,
    the ranks and the number of times a batch is made. The result has at most `max_length` tokens, with packing at most
    as many as the example.
    """

    def __init__(
        self,
        prepared: Prepared,
        batch_size: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        packing: bool = False,
        pad_to_multiple_of: int = 8,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        augment: Augment | None = None,
        masking: Masking | None = None,
    ) -> None:
        """`batch_size`: rows per rank and step; `drop_last`: leave out the rows of an incomplete last step; `masking`:
        hide tokens anew in each epoch, for a masked language model.
        """
        if batch_size < 1 or pad_to_multiple_of < 1:
            raise SettingsError(
                f"batch_size={batch_size}, pad_to_multiple_of={pad_to_multiple_of}: both must be 1 or more"
            )
        if not 0 <= rank < world:
            raise SettingsError(f"rank={rank} is not one of the {world} ranks 0…{world - 1}")
        if packing and prepared.labels:
            raise SettingsError(
                "packing=True needs one label per token; a classification has one per text: leave packing out"
            )
        if packing and masking is not None:
            raise SettingsError(
                "packing=True needs a causal model; a masked one sees all of its row: leave packing out"
            )
        self.prepared = prepared
        self.batch_size, self.seed, self.shuffle, self.packing = batch_size, seed, shuffle, packing
        self.multiple, self.rank, self.world, self.drop_last = pad_to_multiple_of, rank, world, drop_last
        self.augment, self.masking = augment, masking
        self.deck = deck(prepared, packing)
        self.rows = self.deck.rows
        self.step = 0
        self._used, self._steps = self._count()
        self._order = (-1, torch.empty(0, dtype=torch.int64))

    def _count(self) -> tuple[int, int]:
        """(rows used per epoch, steps per epoch)."""
        n, full = self.deck.size, self.batch_size * self.world
        steps, tail = divmod(n, full)
        if self.drop_last and steps:
            return n - tail, steps
        if n < self.world or self.drop_last:
            need = full if self.drop_last else self.world
            raise fault(
                self.prepared.records.source,
                f"{n} rows are too few for {self.world} × {self.batch_size}",
                f"give {need} or more",
            )
        return n, max(1, steps + (tail >= self.world))

    def __len__(self) -> int:
        """Steps per epoch."""
        return self._steps

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, from 0."""
        return self.step // self._steps

    @property
    def causal(self) -> bool:
        """Whether the labels are the input's own tokens, each to be predicted from those before it."""
        return self.masking is None and not self.prepared.labels

    def batch_at(self, step: int) -> Batch:
        """The batch of a step, counted over all epochs; reads nothing but the arguments of this object."""
        epoch = step // self._steps
        return self._collate([[self._example(i, epoch) for i in self.rows[row]] for row in self._mine(step)])

    def sources_at(self, step: int) -> tuple[Where, ...]:
        """Where the examples of that batch come from, row by row."""
        return tuple(self.prepared.examples.where(i) for row in self._mine(step) for i in self.rows[row])

    def __iter__(self) -> Iterator[Batch]:
        end = (self.epoch + 1) * self._steps
        while self.step < end:
            self.step += 1
            yield self.batch_at(self.step - 1)

    def state(self) -> dict[str, Any]:
        """The position as JSON takes it: the next step, and what the order depends on."""
        return {"step": self.step, "epoch": self.epoch, **self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position saved by `state`.

        Raises:
            StateError: the position belongs to other data or other settings (named).
        """
        for name, value in self._identity().items():
            if name not in state or state[name] != value:
                raise StateError(
                    f"the saved data position has {name}={state.get(name)!r}, this run {name}={value!r}: "
                    "the batches would not be the same; resume with the same data and settings, or start anew"
                )
        self.step = int(state["step"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "rows_per_step": self.batch_size * self.world,
            "steps_per_epoch": self._steps,
            "packing": self.packing,
            "drop_last": self.drop_last,
            "augment": _name(self.augment),
            "masking": None if self.masking is None else asdict(self.masking),
            "rows": len(self.rows),
            "ratios": list(self.deck.ratios),
            "digest": self.prepared.digest,
        }

    def _mine(self, step: int) -> list[int]:
        """The rows of a step that this rank gets."""
        epoch, at = divmod(step, self._steps)
        start = at * self.batch_size * self.world
        stop = self._used if at == self._steps - 1 else start + self.batch_size * self.world
        mine: list[int] = self._epoch_order(epoch)[start:stop][self.rank :: self.world].tolist()
        return mine

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            self._order = (epoch, self.deck.order(self.seed, epoch, self.shuffle))
        return self._order[1]

    def _example(self, index: int, epoch: int) -> Example:
        example = self.prepared[index]
        if self.augment is None and self.masking is None:
            return example
        own = generator(self.seed, epoch, index)
        if self.augment is not None:
            example = self._checked(self.augment(example, own), example)
        return example if self.masking is None else self.masking(example, own)

    def _checked(self, made: Example, example: Example) -> Example:
        most = len(example) if self.packing else self.prepared.max_length
        if not 0 < len(made) <= most:
            raise DataError(
                f"{example.where}: augment made {len(made)} tokens of {len(example)}; 1 to {most} are possible"
                + (" with packing" if self.packing else "")
            )
        return made

    def _collate(self, examples: Sequence[Sequence[Example]]) -> Batch:
        lengths = [sum(map(len, row)) for row in examples]
        longest = max(lengths)
        width = max(longest, min(-(-longest // self.multiple) * self.multiple, self.prepared.max_length))
        batch = {"input_ids": torch.full((len(examples), width), self.prepared.pad_id)}
        for out, row in zip(batch["input_ids"], examples):
            _fill(out, [_ints(x.ids) for x in row])
        if self.packing:
            batch["position_ids"] = torch.zeros_like(batch["input_ids"])
            for out, row in zip(batch["position_ids"], examples):
                _fill(out, [torch.arange(len(x)) for x in row])
        else:
            batch["attention_mask"] = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        batch["labels"] = self._labels(examples, batch["input_ids"])
        return batch

    def _labels(self, examples: Sequence[Sequence[Example]], ids: Tensor) -> Tensor:
        if self.prepared.labels:
            return torch.tensor([x.label for row in examples for x in row])
        trained = torch.zeros_like(ids, dtype=torch.bool)
        for out, row in zip(trained, examples):
            _fill(out, [_flags(x.trained) for x in row])
        if self.masking is None:
            return ids.masked_fill(~trained, IGNORED)
        targets = ids.clone()
        for out, row in zip(targets, examples):
            _fill(out, [_ints(x.ids if x.targets is None else x.targets) for x in row])
        return targets.masked_fill(~trained, IGNORED)


def _name(augment: Augment | None) -> str | None:
    return None if augment is None else str(getattr(augment, "__qualname__", type(augment).__qualname__))


def _ints(ids: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.asarray(ids, dtype=np.int32))


def _flags(trained: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(trained), dtype=np.bool_))


def _fill(out: Tensor, parts: Sequence[Tensor]) -> None:
    joined = torch.cat(list(parts))
    out[: len(joined)] = joined
