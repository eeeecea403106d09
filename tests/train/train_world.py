"""A tiny world to train in: models, batches, adapters of every registered method, and runs that break off."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankloom as rl
from rankloom import registry
from rankloom.core.plan import Plan, as_plan
from rankloom.train.fit import Result, fit
from rankloom.train.settings import TrainSettings

sys.path.append(str(Path(__file__).parents[1]))  # `tiny`, in processes of their own too

VOCABULARY = 64


class Interrupted(Exception):
    """Stands for a process that dies."""


def llama(seed: int = 0) -> nn.Module:
    import tiny

    made: nn.Module = tiny.llama(
        seed, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_attention_heads=4, pad_token_id=None
    )
    return made


class Patches(nn.Module):
    """Two convolutions and a head, for methods that want kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv2(self.conv1(x).relu()).relu().mean((-1, -2)))


def patches(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Patches()


def mlp(seed: int = 0, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def texts(n: int = 7, rows: int = 2, length: int = 9) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    made = []
    for i in range(n):
        ids = torch.randint(VOCABULARY, (rows, length), generator=draw)
        labels = ids.clone()
        labels[:, : 2 + i % 3] = -100
        made.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return made


def pictures(n: int = 7) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(6)
    return [(torch.randn(3, 2, 5, 5, generator=draw), torch.randint(4, (3,), generator=draw)) for _ in range(n)]


def points(n: int = 7, rows: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(7)
    return [(torch.randn(rows, 6, generator=draw), torch.randn(rows, 3, generator=draw)) for _ in range(n)]


SMALL: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2, "lora_dropout": 0.1},
    "bilora": {"r": 3, "hypergrad": "none"},
    "lora": {"r": 3, "lora_dropout": 0.2},
    "moelora_task": {"r": 4, "n": 2, "task_embedding_dim": 4, "unknown": 1},
    "relora": {"every": 4, "r": 3, "restart_warmup": 2, "reset": "random", "prune": 0.5},
    "vera": {"r": 8, "vera_dropout": 0.1},
}
CONVOLUTIONAL = {"unrolled_lora"}


def plan_of(name: str) -> Plan:
    """A small plan of any registered method; one that joins later gets its defaults."""
    method = registry.maker(name)(**SMALL.get(name, {}))
    targets = (
        {"target_modules": ["conv1", "conv2"]} if name in CONVOLUTIONAL else {"target_modules": ["o_proj", "up_proj"]}
    )
    if name == "slices":
        targets = {"target_modules": ["up_proj"]}
    return as_plan(method, targets)


def world_of(name: str) -> tuple[Any, list[Any]]:
    """(model maker, batches) that suit a method."""
    return (patches, pictures()) if name in CONVOLUTIONAL else (llama, texts())


def settings(**changes: Any) -> TrainSettings:
    steps = changes.get("steps", 12)
    usual = {"steps": steps, "lr": 5e-3, "accumulate": 2, "warmup_steps": min(2, steps - 1), "log_every": 1}
    return TrainSettings(**{**usual, **changes})


def attached(make: Any, plans: dict[str, Plan], seed: int) -> nn.Module:
    model = make()
    torch.manual_seed(seed)
    for name, plan in plans.items():
        rl.attach(model, plan, name)
    model.rankloom.use(*plans)
    return model


def breaking_at(step: int) -> Any:
    def tell(row: Any) -> None:
        if row["event"] == "save" and row["step"] == step:
            raise Interrupted

    return tell


def straight_and_resumed(
    make: Any, plans: dict[str, Plan], batches: Any, chosen: TrainSettings, out: Path, rules: Any = (), at: int = 5
) -> Iterator[tuple[nn.Module, Result]]:
    """A run in one go, then the same run broken off after `at` steps and taken up by new objects."""
    source = batches if callable(batches) and not isinstance(batches, list) else lambda: batches
    model = attached(make, plans, 1)
    yield model, fit(model, source(), rules=[r() for r in rules], settings=chosen, out=out / "straight")
    first = attached(make, plans, 1)
    broken = TrainSettings(**{**vars(chosen), "save_every": at})
    with suppress(Interrupted):
        fit(first, source(), rules=[r() for r in rules], settings=broken, out=out / "broken", report=breaking_at(at))
    torch.manual_seed(99)
    torch.rand(7)
    second = attached(make, plans, 2)
    result = fit(second, source(), rules=[r() for r in rules], settings=chosen, out=out / "broken", resume="auto")
    yield second, result


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{n}/{k}": p.detach().clone() for n in model.rankloom.names for k, p, _ in model.rankloom.tensors(n)}


def base_of(model: nn.Module) -> dict[str, torch.Tensor]:
    from rankloom.core.targets import base_tensors

    return {f"{path}.{key}": t.detach().clone() for path, _, key, t in base_tensors(model)}
