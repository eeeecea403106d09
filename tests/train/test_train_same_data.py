"""A resumed run on other data is refused, whatever the data are given as; where that cannot be known, the risk is
told; and the same data are never taken for others."""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from train_world import attached, mlp, points, settings

import rankloom as rl
from rankloom.core.plan import Plan
from rankloom.errors import StateError
from rankloom.train.digest import MOST, digest, opaque
from rankloom.train.fit import fit
from rankloom.train.processes import Processes
from rankloom.train.stream import stream_of

PLAN = Plan(rl.LoRA(r=2, lora_dropout=0.2))
CHOSEN = settings(accumulate=1, save_every=5)
POINTS = points()
OTHERS = [(x + 1, y) for x, y in POINTS]


class Stop(Exception):
    pass


def go(out: Path, batches: Any, at: int | None = None, resume: Any = "auto") -> Any:
    def tell(row: Any) -> None:
        if (row["event"], row["step"]) == ("save", at):
            raise Stop

    model = attached(mlp, {"default": PLAN}, 1)
    return fit(model, batches, settings=CHOSEN, out=out, resume=resume, report=tell)


def broken_off(out: Path, batches: Any, at: int = 5) -> None:
    with pytest.raises(Stop):
        go(out, batches, at, resume=False)


class Records(Dataset[Any]):
    def __init__(self, records: list[Any] = POINTS, draws: Callable[[], Any] = lambda: 0) -> None:
        self.records, self.draws = records, draws

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Any:
        x, y = self.records[i]
        return x + self.draws(), y


class Stream(IterableDataset[Any]):
    def __init__(self, records: list[Any] = POINTS) -> None:
        self.records = records

    def __iter__(self) -> Iterator[Any]:
        return iter(self.records)


def loader(data: Any = None, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(Records() if data is None else data, batch_size=None, **kwargs)


def far(records: list[Any]) -> list[Any]:
    """Something changed where the run has not come to yet."""
    return [*records[:-1], OTHERS[-1]]


SOURCES: dict[str, tuple[Any, Any]] = {
    "a list, reversed": (lambda: POINTS, lambda: POINTS[::-1]),
    "a list, rotated": (lambda: POINTS, lambda: [*POINTS[1:], POINTS[0]]),
    "a list, longer": (lambda: POINTS, lambda: [*POINTS, POINTS[0]]),
    "a list, shorter": (lambda: POINTS, lambda: POINTS[:-1]),
    "a list, one record not yet taken": (lambda: POINTS, lambda: far(POINTS)),
    "a list, another type": (lambda: POINTS, lambda: [(x.double(), y) for x, y in POINTS]),
    "a list, other targets": (lambda: POINTS, lambda: [(x, y + 1) for x, y in POINTS]),
    "a tuple, reversed": (lambda: tuple(POINTS), lambda: tuple(POINTS[::-1])),
    "a loader, other records": (loader, lambda: loader(Records(OTHERS))),
    "a loader, longer": (loader, lambda: loader(Records([*POINTS, POINTS[0]]))),
    "a loader, shuffled now": (loader, lambda: loader(shuffle=True)),
    "a loader, no longer shuffled": (lambda: loader(shuffle=True), loader),
    "a shuffling loader, other records": (lambda: loader(shuffle=True), lambda: loader(Records(OTHERS), shuffle=True)),
    "a loader of another seed": (
        lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(1)),
        lambda: loader(Records(POINTS[::-1]), shuffle=True, generator=torch.Generator().manual_seed(2)),
    ),
    "a loader that draws, other records": (
        lambda: loader(Records(draws=lambda: torch.rand(()))),
        lambda: loader(Records(OTHERS, lambda: torch.rand(()))),
    ),
    "a loader that draws, reversed": (
        lambda: loader(Records(draws=random.random)),
        lambda: loader(Records(POINTS[::-1], random.random)),
    ),
    "a loader without length": (lambda: loader(Stream()), lambda: loader(Stream(OTHERS))),
    "a loader without length, reversed": (lambda: loader(Stream()), lambda: loader(Stream(POINTS[::-1]))),
    "a loader for a list": (loader, lambda: POINTS),
    "an iterable": (lambda: Stream(), lambda: Stream(POINTS[::-1])),
    "a function": (lambda: lambda i: POINTS[i % 7], lambda: lambda i: POINTS[(i + 1) % 7]),
    "a function that draws": (
        lambda: lambda i: (POINTS[i % 7][0] + torch.rand(()), POINTS[i % 7][1]),
        lambda: lambda i: (OTHERS[i % 7][0] + torch.rand(()), OTHERS[i % 7][1]),
    ),
    "a function for a list": (lambda: lambda i: POINTS[i % 7], lambda: POINTS),
    "a one-shot iterator": (lambda: iter(POINTS * 2), lambda: iter(POINTS[::-1] * 2)),
}


@pytest.mark.parametrize("at", [5, 10])
@pytest.mark.parametrize("name", SOURCES)
def test_other_data_are_refused_before_a_tensor_is_touched(name: str, at: int, tmp_path: Path) -> None:
    source, other = SOURCES[name]
    broken_off(tmp_path, source(), at)
    model = attached(mlp, {"default": PLAN}, 2)
    before = [p.detach().clone() for _, p, _ in model.rankloom.tensors("default")]
    with pytest.raises(StateError, match=r"other data than the checkpoint's|batches of another kind"):
        fit(model, other(), settings=CHOSEN, out=tmp_path, resume="auto")
    assert all(torch.equal(a, p) for a, (_, p, _) in zip(before, model.rankloom.tensors("default"), strict=True))


@pytest.mark.parametrize("at", [5, 10])
@pytest.mark.parametrize("name", SOURCES)
def test_the_same_data_go_on_exactly(name: str, at: int, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    source, _ = SOURCES[name]
    whole = go(tmp_path / "whole", source(), resume=False)
    broken_off(tmp_path / "broken", source(), at)
    recwarn.clear()
    assert go(tmp_path / "broken", source()).losses == whole.losses
    assert not [w for w in recwarn if "data" in str(w.message)]


def test_of_several_streams_the_one_with_other_data_is_named(tmp_path: Path) -> None:
    def run(other: Any, resume: Any) -> Any:
        model = attached(mlp, {"default": PLAN}, 1)
        batches = {"retain": loader(shuffle=True), "forget": other}

        def loss(model: Any, batch: Any) -> Tensor:
            return sum((model(x) - y).square().mean() for x, y in batch.values())  # type: ignore[return-value]

        return fit(model, batches, settings=CHOSEN, out=tmp_path, loss=loss, resume=resume)

    whole = run(lambda i: POINTS[i % 7], False)
    assert run(lambda i: POINTS[i % 7], "auto").losses == whole.losses
    with pytest.raises(StateError, match="the stream 'forget': other data than the checkpoint's"):
        run(lambda i: OTHERS[i % 7], "auto")


@pytest.mark.parametrize("kind", ["loader", "function"])
def test_data_that_cannot_be_known_are_told_of(kind: str, tmp_path: Path) -> None:
    """A source of random numbers of their own, which no checkpoint holds."""
    draw = np.random.default_rng(0)

    def source() -> Any:
        made = Records(draws=lambda: float(draw.random()))
        return loader(made) if kind == "loader" else lambda i: made[i % 7]

    broken_off(tmp_path, source())
    with pytest.warns(UserWarning, match="whether the data are those of the checkpoint cannot be known"):
        assert go(tmp_path, source()).steps == 12


def test_batches_that_cannot_be_looked_into_are_told_of(tmp_path: Path) -> None:
    class Pair:
        def __init__(self, pair: Any) -> None:
            self.pair = pair

    def loss(model: Any, batch: Any) -> Tensor:
        return (model(batch.pair[0]) - batch.pair[1]).square().mean()

    def run(resume: Any, report: Any = None) -> Any:
        model = attached(mlp, {"default": PLAN}, 1)
        return fit(model, [Pair(p) for p in POINTS], settings=CHOSEN, out=tmp_path, loss=loss, resume=resume)

    run(False)
    with pytest.warns(UserWarning, match="hold a Pair, which is not looked into"):
        run("auto")


def test_a_one_shot_iterator_is_not_drawn_from_more_than_was_taken(tmp_path: Path) -> None:
    broken_off(tmp_path, iter(POINTS * 2))
    other = iter(OTHERS * 2)
    with pytest.raises(StateError, match="other data"):
        go(tmp_path, other)
    assert len(list(other)) == len(OTHERS) * 2 - 5


def test_a_function_is_called_for_one_batch_more(tmp_path: Path) -> None:
    asked: list[int] = []

    def make(i: int) -> Any:
        asked.append(i)
        return POINTS[i % 7]

    broken_off(tmp_path, make)
    assert asked == [0, 1, 2, 3, 4]
    go(tmp_path, make)
    assert asked[5:] == [4, 5, 6, 7, 8, 9, 10, 11]


def test_of_several_processes_the_main_one_compares() -> None:
    """A loader that is dealt out gives the others batches that the main one's checkpoint knows nothing of."""

    def dealt(rank: int, records: list[Any] = POINTS) -> Any:
        made = stream_of(records, Processes())
        made.use = dataclasses.replace(made.use, compares=rank == 0)  # type: ignore[attr-defined]
        return made

    one = dealt(0)
    for _ in range(3):
        one.next()
    state = one.state()
    dealt(1, OTHERS).restore(state)
    with pytest.raises(StateError):
        dealt(0, OTHERS).restore(state)
    for rank in (0, 1):
        shared = stream_of(Stream(), Processes(rank=rank, world=2))
        assert shared.stream.use.compares == (rank == 0)  # type: ignore[attr-defined]


def test_without_checkpoints_nothing_is_compared_or_noted(tmp_path: Path) -> None:
    broken_off(tmp_path, POINTS)
    for source in (POINTS, lambda i: POINTS[i % 7]):
        stream = stream_of(source, Processes(), kept=False)
        stream.next()
        assert "" in (getattr(stream, "last", None), getattr(getattr(stream, "seen", None), "all", None))
    model = attached(mlp, {"default": PLAN}, 1)
    with pytest.raises(StateError, match="other data"):
        fit(model, POINTS[::-1], settings=settings(accumulate=1), resume=tmp_path)


@dataclass
class Made:
    x: Any


ALIKE: list[tuple[Any, Any]] = [
    (torch.arange(3), np.arange(3)),
    ({"a": 1.5}, {"a": 1.5}),
    (Made(torch.ones(2)), Made(torch.ones(2))),
    (torch.ones(2, 3).T, torch.ones(3, 2)),
    (np.array(["ab", "c"]), np.array(["ab", "c"])),
    (torch.zeros(2, requires_grad=True), torch.zeros(2)),
    (b"ab", bytearray(b"ab")),
]
UNLIKE: list[tuple[Any, Any]] = [
    (torch.arange(3), torch.arange(3).float()),
    (torch.zeros(2, 3), torch.zeros(3, 2)),
    (torch.zeros(6), torch.zeros(2, 3)),
    ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
    ({"a": 1}, {"b": 1}),
    (["ab", "c"], ["a", "bc"]),
    ([1, [2]], [[1], 2]),
    ([[]], []),
    (1, 1.0),
    (True, 1),
    ("1", 1),
    (None, "None "),
    (Made(1), Made(2)),
    (np.array(["a"], dtype=object), np.array(["b"], dtype=object)),
    (torch.tensor(float("nan")), torch.tensor(0.0)),
    (torch.zeros(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)),
    (torch.arange(MOST * 3), torch.arange(MOST * 3).flip(0)),
    (list(range(MOST * 3)), list(range(MOST * 3))[::-1]),
    (torch.zeros(0, 3), torch.zeros(0, 4)),
    (torch.tensor(1 + 2j), torch.tensor(1 - 2j)),
    (torch.zeros(3).to(torch.float8_e4m3fn), torch.ones(3).to(torch.float8_e4m3fn)),
]


def test_digests() -> None:
    for one, two in ALIKE:
        assert digest(one) == digest(two), (one, two)
    for one, two in UNLIKE:
        assert digest(one) != digest(two), (one, two)
        assert not opaque(digest(one, two))
    assert opaque(digest([object()])) == "object"
    assert opaque(digest({"a": torch.zeros(2, 2).to_sparse()}))
    assert digest({"text": "a \ud800 b"}) == digest({"text": "a \ud800 b"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        digest(np.arange(3)[::-1], np.zeros(2, dtype=">f4"))
