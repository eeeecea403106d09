"""What runs in each of two processes: every method's run, and whatever else one launch can try. Results go to files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from train_world import VOCABULARY, mlp, points, settings, texts

import rankloom as rl
from rankloom.core.plan import Plan, as_plan
from rankloom.core.rule import Rule
from rankloom.errors import RankloomError
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat
from rankloom.train.fit import Result, fit


class Block(nn.Module):
    """Attention over what came before, and one wide layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        x = x + self.o_proj(F.scaled_dot_product_attention(self.q_proj(h), h, h, is_causal=True))
        return x + self.down_proj(F.silu(self.up_proj(x)))


class Language(nn.Module):
    """A causal language model of two blocks, of plain torch: a library of models takes long to import."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())}


TARGETS = {"target_modules": ["q_proj", "o_proj", "up_proj"]}
PLANS: dict[str, Callable[[], Plan]] = {
    "lora": lambda: as_plan(rl.LoRA(r=3), TARGETS),
    "dora": lambda: as_plan(rl.DoRA(rl.LoRA(r=3)), TARGETS),
    "vera": lambda: as_plan(rl.VeRA(r=4), TARGETS),
    "adalora": lambda: as_plan(rl.AdaLoRA(init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1), TARGETS),
    "dylora": lambda: as_plan(rl.DyLoRA(r=4), TARGETS),
    "lora+ and whole": lambda: as_plan(rl.LoRA(r=3), {**TARGETS, "modules_to_save": ["norm"], "bias": "all"}),
    "nf4": lambda: as_plan(rl.LoRA(r=3), TARGETS),
}
STEPS = 6


def model_of(name: str, seed: int = 1) -> nn.Module:
    """In float64, so that the order of summation does not show."""
    torch.manual_seed(0)
    model = Language().double()
    if name == "nf4":
        keep(
            model,
            {
                f"{n}.weight": NormalFloat()
                for n, m in model.layers.named_modules(prefix="layers")
                if type(m) is nn.Linear
            },
        )
    torch.manual_seed(seed)
    rl.attach(model, PLANS[name]())
    return model


def run(name: str, rank: int = 0, world: int = 1, **changes: Any) -> tuple[nn.Module, Result]:
    """The run of a method. Alone it accumulates the batches that two processes share."""
    out, resume = changes.pop("out", None), changes.pop("resume", False)
    model = model_of(name, seed=1 + rank)
    chosen = settings(**{"steps": STEPS, "accumulate": 2 // world, "eval_every": 3, **changes})
    rules = [rl.LoRAPlus()] if name == "lora+ and whole" else []
    return model, fit(model, texts(), settings=chosen, evaluate=texts(3), rules=rules, out=out, resume=resume)


def told(model: nn.Module, result: Result) -> dict[str, Any]:
    bank = model.rankloom
    return {
        "losses": result.losses,
        "metrics": [result.metrics["before"]["loss"], result.metrics["after"]["loss"]],
        "tokens": result.tokens,
        "tensors": {k: p.detach().flatten().tolist() for k, p, _ in bank.tensors("default")},
    }


def attempt(work: Callable[[], Any]) -> list[str]:
    """The error that `work` ends with, as [type, message]."""
    try:
        work()
    except (RankloomError, OSError) as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]


class Torn:
    """Batches of which process 1 cannot read the fourth."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, number: int) -> Any:
        if number == 3 and self.rank == 1:
            from rankloom.errors import DataError

            raise DataError("shard-7.jsonl:12: no field 'text'")
        return points()[number % 7]


class Drawing(Rule):
    """Draws a number where rules decide."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def before_step(self, run: Any) -> None:
        self.drawn.append(float(torch.rand(())))


def random_numbers() -> dict[str, list[float]]:
    """What is drawn in rules and in forward passes; the model's starts differ between the processes."""
    rule, inside = Drawing(), []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        inside.append(float(torch.rand(())))
        return model(batch[0]).square().mean()

    model = mlp()
    rl.attach(model, rl.LoRA(r=2))
    fit(model, points(), steps=3, rules=[rule], loss=loss, settings=settings(steps=3, accumulate=1, seed=None))
    return {"rules": rule.drawn, "forward": inside}


class Branches(nn.Module):
    """Two experts; a batch visits one of them, and the third is never heard."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def forward(self, which: int, x: torch.Tensor) -> torch.Tensor:
        return self.experts[which](x)


def branches(accumulate: int) -> dict[str, Any]:
    model = Branches().double()
    torch.manual_seed(1)
    bank = rl.attach(model, rl.LoRA(r=2))
    batches = [(i % 2, x.double(), y.double()) for i, (x, y) in enumerate(points(8))]
    found = fit(model, batches, settings=settings(steps=4, accumulate=accumulate, dead_gradients="warn"))
    return {"losses": found.losses, "tensors": {k: p.flatten().tolist() for k, p, _ in bank.trainable()}}


def by_hand(rank: int | None) -> dict[str, Any]:
    """Gradients under torch's own wrapper in a loop of one's own; None: of both batches, without it."""
    found = {}
    for name in ("lora", "vera", "nf4"):
        model = model_of(name)
        bank = model.rankloom
        if rank is None:
            for batch in texts()[:2]:
                (model(**batch)["loss"] / 2).backward()
        else:
            wrapped = nn.parallel.DistributedDataParallel(model)
            wrapped(**texts()[rank])["loss"].backward()
        found[name] = {k: p.grad.flatten().tolist() for k, p, _ in bank.trainable()}
    return found


def everything(out: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in PLANS:
        found[name] = told(*run(name, rank, 2))
    for name in ("lora", "dora", "vera", "adalora", "nf4", "lora+ and whole"):
        found[f"{name}, sharded"] = told(*run(name, rank, 2, sharding="fsdp"))
    for name in ("lora", "adalora", "vera"):
        run(name, rank, 2, out=out / f"{name}-two", save_every=3, keep=9)
        found[f"{name}, taken up"] = told(*run(name, rank, 2, out=out / f"{name}-one", resume=True))
    found["sharded, taken up"] = told(*run("lora", rank, 2, out=out / "sharded", resume=True, sharding="fsdp"))
    found["torn data"] = attempt(lambda: fit(mlp_with_lora(), Torn(rank), settings=settings(accumulate=1)))
    found["no room"] = attempt(lambda: run("lora", rank, 2, out=out / "file"))
    found["other plan"] = attempt(lambda: run("lora" if rank else "dora", rank, 2))
    found["whole model, sharded"] = attempt(lambda: fit(mlp(), points(), settings=settings(sharding="fsdp")))
    found["random"] = random_numbers()
    found["branches"] = branches(accumulate=1)
    found["by hand"] = by_hand(rank)
    return found


def mlp_with_lora() -> nn.Module:
    model = mlp()
    rl.attach(model, rl.LoRA(r=2))
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, number = Path(sys.argv[1]), int(os.environ["RANK"])
    (folder / f"{number}.json").write_text(json.dumps(everything(folder, number)))
    torch.distributed.destroy_process_group()
