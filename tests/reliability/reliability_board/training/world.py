"""Tiny runs that have everything a checkpoint must carry: one for each registered method and rule, and some of both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from rankloom import registry
from rankloom.core.attach import attach
from rankloom.core.plan import Plan, as_plan
from rankloom.core.rule import Rule
from rankloom.errors import RankloomError
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat
from rankloom.train.checkpoint import PLACE, newest_checkpoint
from rankloom.train.data import Batches, Example, Examples, Prepared, Records, Where
from rankloom.train.fit import Result, fit
from rankloom.train.settings import TrainSettings
from reliability_board.training.process import together

WORDS, WIDTH = 40, 32
PLACES = (("up", "down"), ("conv",))
"""Where a method is tried, in this order: linear layers, then a convolution."""
ENOUGH = 5
"""Faults after which a measurement stops: it has failed."""
SETTINGS = TrainSettings(
    steps=8, lr=5e-3, warmup_steps=2, accumulate=2, eval_every=3, save_every=1, log_every=1, dead_gradients="warn"
)


class Tiny(nn.Module):
    """Embedding, convolution, two linear layers with dropout between, head; gives its loss, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, 3 * WIDTH)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(3 * WIDTH, WORDS)

    def forward(self, input_ids: Tensor, labels: Tensor, **others: Tensor) -> SimpleNamespace:
        """Loss over the tokens that have labels."""
        h = self.embed(input_ids)
        h = h + self.conv(h.mT.unsqueeze(-1)).squeeze(-1).mT
        logits = self.head(self.down(self.dropout(torch.tanh(self.up(h)))))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


@dataclass(frozen=True)
class World:
    """One tiny run, shared by `processes`.

    `plans` by adapter name, `rules` by registered name, `data` and `base` make what they say.
    """

    name: str
    plans: Mapping[str, Plan]
    rules: tuple[str, ...] = ()
    processes: int = 1
    data: Callable[[], Any] = field(default=lambda: words())
    base: Callable[[], nn.Module] = field(default=lambda: tiny())
    settings: TrainSettings = SETTINGS

    def run(self, out: Path | None, report: Callable[[Any], None] = lambda row: None) -> Result:
        """Go on in `out`, or begin there: the part of one process."""
        torch.set_num_threads(1)
        model = self.base()
        torch.manual_seed(1)
        for name, plan in self.plans.items():
            attach(model, plan, name)
        if self.plans:
            model.rankloom.use(*self.plans)  # type: ignore[union-attr, operator]
        rules: list[Rule] = [registry.load(registry.RULES[name])() for name in self.rules]
        settings = self.settings if out is not None else dataclasses.replace(self.settings, steps=3, save_every=None)
        return fit(
            model,
            self.data(),
            rules=rules,
            settings=settings,
            evaluate=[words().batch_at(0)],
            out=out,
            resume=False if out is None else "auto",
            report=report,
        )


APART = frozenset({"blend", "llava_mole", "lora_flow", "xlora"})
"""Methods that build on other adapters, or look at the blocks of a model."""
RULES_APART = frozenset({"bilevel"})
"""Rules that need more than one stream of data; their own tests resume them."""
TOLD: Mapping[str, Mapping[str, Any]] = {"bilora": {"hypergrad": "none"}, "moelora_task": {"unknown": 0}}
"""Settings of methods that need more than one stream of data, or a column of it, at their defaults."""


def worlds() -> Iterator[World]:
    """Every registered method, every registered rule, those with a memory in two processes too, and what runs have
    beside them.
    """
    plans = {name: plan_of(name) for name in registry.METHODS if name not in APART}
    spoken = {name: [type(rule) for rule in (*plan.method.rules(), *plan.rules)] for name, plan in plans.items()}
    every = {type_ for each in spoken.values() for type_ in each}
    methods = [World(name, {"default": plan}) for name, plan in plans.items()]
    others = {name: target for name, target in registry.RULES.items() if name not in RULES_APART}
    rules = [_with_rule(name, plans) for name, target in others.items() if registry.load(target) not in every]
    yield from (*methods, *rules)
    for world in (*(method for method in methods if spoken[method.name]), *rules):
        yield dataclasses.replace(world, name=f"{world.name} in two processes", processes=2)
    lora = plans["lora"]
    yield World("two processes", {"default": lora}, processes=2)
    yield World("an NF4 base", {"default": lora}, base=packed)
    yield World("three adapters at once", {"a": lora, "b": plans["adalora"], "c": plans["vera"]})
    yield World("a shuffling loader that draws", {"default": lora}, data=noise)
    yield World("no adapter", {})
    yield World("bfloat16", {"default": lora}, settings=dataclasses.replace(SETTINGS, precision="bf16"))


def plan_of(name: str) -> Plan:
    """The registered method with its defaults, where it fits."""
    for place in PLACES:
        plan = as_plan(registry.maker(name)(**TOLD.get(name, {})), {"target_modules": place})
        try:
            attach(tiny(), plan)
        except RankloomError:
            continue
        return plan
    raise RankloomError(f"{name} fits none of {PLACES} of the tiny model")


def _with_rule(name: str, plans: Mapping[str, Plan]) -> World:
    """The rule on LoRA, or on the first method that it goes with."""
    for method in ("lora", *plans):
        world = World(f"{name} on {method}", {"default": plans[method]}, (name,))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                world.run(None)
        except RankloomError:
            continue
        return world
    raise RankloomError(f"the rule {name} runs with no registered method at its defaults")


def tiny() -> nn.Module:
    """The base, always the same."""
    torch.manual_seed(0)
    return Tiny()


def packed() -> nn.Module:
    """The base with its linear layers in NF4."""
    model = tiny()
    keep(model, {f"{name}.weight": NormalFloat(block=32) for name in ("up", "down")})
    return model


def words() -> Batches:
    """Eleven texts, shuffled, each token replaced by another one in three."""
    draw = torch.Generator().manual_seed(5)
    lengths = [4 + i % 5 for i in range(11)]
    ids = [torch.randint(1, WORDS, (n,), generator=draw).tolist() for n in lengths]
    made = tuple(
        Example(array("i", one), bytes([0] + [1] * (len(one) - 1)), None, Where("made", i + 1))
        for i, one in enumerate(ids)
    )
    prepared = Prepared(Examples.of(made), Records((), "text", "made", ()), 16, 0, None, 0, 0, ())
    return Batches(prepared, 2, seed=3, augment=_masked)


def _masked(example: Example, draw: torch.Generator) -> Example:
    ids = torch.tensor(list(example.ids))
    other = torch.randint(1, WORDS, ids.shape, generator=draw)
    chosen = torch.rand(ids.shape, generator=draw) < 1 / 3
    return dataclasses.replace(example, ids=array("i", torch.where(chosen, other, ids).tolist()))


class _Noise(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(1, WORDS, (2, 6)) * (index + 1) % WORDS
        return {"input_ids": ids, "labels": ids}


def noise() -> DataLoader[dict[str, Tensor]]:
    """A loader that shuffles, over data that draw random numbers."""
    return DataLoader(_Noise(), batch_size=None, shuffle=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: a killed process loses nothing that it wrote, synced or not."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


def warm(world: World) -> None:
    """Import all that a run imports, so that forked children need not."""
    with scratch() as folder:
        ended(world, folder)


def ended(world: World, out: Path) -> str:
    """Run to the end, several processes as forked ones; `ending`."""
    if world.processes > 1:
        codes = together(world.processes, partial(world.run, out))
        if any(code != 0 for code in codes):
            raise RankloomError(f"the processes ended with {codes}")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            world.run(out)
    return ending(out)


def ending(out: Path) -> str:
    """A digest of all that a run came to: losses, weights, optimizer, rules, random state, place in the data …"""
    found = newest_checkpoint(out / PLACE)
    assert found is not None
    data = json.loads((found.folder / "state.json").read_bytes())
    del data["standing"]["seconds"]
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    for name in ("weights.safetensors", "state.safetensors"):
        digest.update((found.folder / name).read_bytes())
    return digest.hexdigest()
