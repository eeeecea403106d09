"""One process beside two on a tiny Llama: the losses of every method, and how far they are from each other.

OMP_NUM_THREADS=1 python bench/wide.py        each run in float64; two gloo processes on this machine
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rankloom as rl
from rankloom.core.method import Method
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat
from rankloom.train.settings import TrainSettings

STEPS, VOCABULARY = 8, 64
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
}
METHODS: dict[str, Method] = {
    "LoRA": rl.LoRA(r=4),
    "DoRA": rl.DoRA(rl.LoRA(r=4)),
    "AdaLoRA": rl.AdaLoRA(init_r=6, target_r=3, tinit=1, tfinal=2, deltaT=1),
    "VeRA": rl.VeRA(r=8),
    "DyLoRA": rl.DyLoRA(r=4),
    "LoRA on NF4": rl.LoRA(r=4),
    "LoRA, chunked loss": rl.LoRA(r=4),
}


def losses(name: str, processes: int, sharding: str) -> list[float]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).double()
    if "NF4" in name:
        linear = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
        keep(model, dict.fromkeys([f"{n}.weight" for n in linear], NormalFloat()))
    rl.attach(model, METHODS[name], target_modules="all-linear")
    chunk = 5 if "chunked" in name else None
    settings = TrainSettings(
        steps=STEPS,
        lr=1e-2,
        accumulate=2 // processes,
        sharding=sharding,
        chunked_loss=chunk,  # type: ignore[arg-type]
    )
    return rl.fit(model, texts(), settings=settings).losses


def texts() -> list[dict[str, Tensor]]:
    """Batches of unequal weight: each trains on another number of tokens."""
    draw = torch.Generator().manual_seed(5)
    made = []
    for i in range(7):
        ids = torch.randint(VOCABULARY, (4, 12), generator=draw)
        made.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(12) < 2 + i, -100)})
    return made


def one_of_two(out: Path) -> None:
    found = {f"{n}|{s}": losses(n, 2, s) for n in METHODS for s in ("none", "fsdp")}
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def two() -> dict[str, list[float]]:
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        out = Path(folder) / "losses.json"
        common = {
            **os.environ,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "CUDA_VISIBLE_DEVICES": "",
        }
        started = [
            subprocess.Popen([sys.executable, __file__, str(out)], env={**common, "RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(2)
        ]
        codes = [p.wait() for p in started]
        if any(codes):
            raise SystemExit("a process failed")
        found: dict[str, list[float]] = json.loads(out.read_text())
        return found


def main() -> None:
    together = two()
    for name in METHODS:
        alone = losses(name, 1, "none")
        for sharding, what in (("none", "two processes"), ("fsdp", "two, base split")):
            shared = together[f"{name}|{sharding}"]
            apart = max(abs(a - b) for a, b in zip(alone, shared, strict=True))
            print(
                f"{name:18} {what:16} loss {shared[0]:.6f} → {shared[-1]:.6f}   largest difference to one {apart:.1e}"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_of_two(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
