"""Quantised bases at 2, 3 and 4 bits: what the embedded world's texts suffer, and what a held-out skill still learns.

OMP_NUM_THREADS=1 python bench/quantised.py [--quick | --only METHOD | --only memory]

writes bench/results/quantised.json.

Each row starts from the embedded base, is fine-tuned on a skill that the base never saw, and is judged on held-out
questions of it, and by the perplexity of held-out texts of the world. A full fine-tuning and a LoRA on the dense base
stand beside them. Peak memory is that of one training step of a larger model, each in a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

import rankloom as rl
from rankloom import microworld
from rankloom.core.plan import Plan
from rankloom.hf.models import load_model
from rankloom.jobs.evaluation import Evaluator
from rankloom.store.base import stored_tensors
from rankloom.train import data
from rankloom.train.config import ModelSettings
from rankloom.train.settings import TrainSettings

TASK, STEPS, BATCH, R = "hill_kelor", 200, 16, 16
TEXTS, JUDGED, SHOWN = 96, 100, 64
RESULT = Path(__file__).parent / "results" / "quantised.json"
HIDDEN, INNER, LAYERS, TOKENS = 1024, 2816, 12, 256


def plans(bits: int) -> dict[str, Plan]:
    """What is compared at a width; the widths of LQ-LoRA's matrices differ, a quarter of a bit above on average."""
    common: dict[str, Any] = {"r": R, "lora_alpha": R}
    return {
        "QLoRA": rl.qlora(bits=bits, **common),
        "LoftQ": rl.loftq(bits=bits, **common),
        "LQ-LoRA": rl.lq_lora(bits=bits + 0.25, fisher=True, **common),
        "QA-LoRA": Plan(rl.QALoRA(**common, pool="sum"), store=rl.Uniform(bits, 32)),
        "L²QER": rl.lqer(bits=bits, activations=True, **common),
    }


def text_batches(tokenizer: Any, texts: list[str]) -> list[dict[str, torch.Tensor]]:
    """One text a batch: no padding, every token counts alike."""
    ids = [torch.tensor([tokenizer(text)["input_ids"][:512]]) for text in texts]
    return [{"input_ids": row, "labels": row} for row in ids]


@torch.no_grad()
def perplexity(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    model.eval()
    total = tokens = 0.0
    for batch in batches:
        count = batch["labels"].shape[1] - 1
        total, tokens = total + float(model(**batch).loss) * count, tokens + count
    return math.exp(total / tokens)


def stored_bytes(weight: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in stored_tensors(weight))


def bits_per_weight(model: nn.Module) -> float:
    """Of the linear layers inside the blocks."""
    weights = [m._parameters["weight"] for n, m in model.named_modules() if n.endswith("_proj")]
    return 8 * sum(map(stored_bytes, weights)) / sum(w.numel() for w in weights)


def run(name: str, plan: Plan | None, steps: int, full: bool = False) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    loaded = load_model(ModelSettings("microworld"))
    model, tokenizer = loaded.model, loaded.tokenizer
    texts = text_batches(tokenizer, microworld.documents("test", TEXTS))
    learned = data.prepare(data.load(f"microworld:{TASK}#2000"), tokenizer, max_length=128)
    judge = Evaluator(
        data.prepare(data.load(f"microworld:{TASK}#{JUDGED}", "test"), tokenizer, max_length=128), tokenizer, 50, JUDGED
    )
    if plan is not None:
        shown = text_batches(tokenizer, microworld.documents("train", SHOWN))
        rl.attach(model, plan, calibration=shown)
    start, width = perplexity(model, texts), bits_per_weight(model)
    settings = TrainSettings(steps=steps, lr=3e-4 if full else 3e-3)
    began = time.process_time()
    rl.fit(model, data.Batches(learned, BATCH), settings=settings, report=lambda row: None)
    seconds = time.process_time() - began
    found = judge(model)
    return {
        "method": name,
        "bits": round(width, 2),
        "start_perplexity": round(start, 3),
        "exact_match": found["exact_match"],
        "loss": round(found["loss"], 4),
        "end_perplexity": round(perplexity(model, texts), 3),
        "cpu_seconds": round(seconds, 1),
    }


# ---- memory ---------------------------------------------------------------------------------------------------------

STORES: dict[str, Any] = {
    "float32, full fine-tuning": None,
    "float32": None,
    "bfloat16": None,
    "NormalFloat 4": rl.NormalFloat(4),
    "NormalFloat 3": rl.NormalFloat(3),
    "NormalFloat 2": rl.NormalFloat(2),
    "Uniform 4": rl.Uniform(4),
}


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        shapes = {"q": (HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN), "up": (HIDDEN, INNER), "down": (INNER, HIDDEN)}
        for name, (i, o) in shapes.items():
            self.add_module(name, nn.Linear(i, o, bias=False, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.o(torch.tanh(self.q(x)))
        return x + self.down(torch.relu(self.up(x)))


def memory_of(name: str) -> None:
    """Print the bytes of the weights and the growth of the resident set in one training step, as JSON."""
    store = STORES[name]
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    model = nn.Sequential()
    before = _status("VmRSS")
    for _ in range(LAYERS):
        block = Block(dtype)
        if store is not None:
            for layer in block.children():
                layer.weight = nn.Parameter(store.pack(layer.weight), requires_grad=False)
        model.append(block)
    weights = sum(map(stored_bytes, model.parameters()))
    if "full" not in name:
        rl.attach(model, rl.LoRA(r=R))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        model(torch.randn(TOKENS, HIDDEN, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    print(json.dumps({"store": name, "weights_mb": weights / 1e6, "peak_mb": (_status("VmHWM") - before) / 1e3}))


def _status(key: str) -> int:
    """kB of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def memory() -> list[dict[str, Any]]:
    """Each store in a process whose freed blocks go back to the system at once, so that the resident set tells."""
    found, kept_small = [], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for name in STORES:
        command = [sys.executable, __file__, "--memory", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=kept_small)
        found.append({k: round(v, 1) if isinstance(v, float) else v for k, v in json.loads(done.stdout).items()})
        print(f"{name:28} weights {found[-1]['weights_mb']:8.1f} MB   peak of a step {found[-1]['peak_mb']:8.1f} MB")
    return found


def main() -> None:
    if "--memory" in sys.argv:
        memory_of(sys.argv[-1])
        return
    if "--only" in sys.argv:
        only(sys.argv[-1])
        return
    quick = "--quick" in sys.argv
    torch.set_num_threads(1)
    steps = 20 if quick else STEPS
    rows = [run("full fine-tuning", None, steps, full=True), run("LoRA", Plan(rl.LoRA(r=R, lora_alpha=R)), steps)]
    for row in rows:
        _tell({**row, "width": "dense"})
    table = [{**row, "width": "dense"} for row in rows]
    for bits in (4,) if quick else (4, 3, 2):
        for name, plan in plans(bits).items():
            table.append({**run(name, replace(plan), steps), "width": bits})
            _tell(table[-1])
    result = {"task": TASK, "steps": steps, "r": R, "rows": table, "memory": memory()}
    if not quick:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


def only(method: str) -> None:
    """Measure the rows of one method again, in their places; "memory": that table."""
    torch.set_num_threads(1)
    result = json.loads(RESULT.read_text())
    if method == "memory":
        result["memory"] = memory()
    for number, row in enumerate(result["rows"]):
        if row["method"] == method:
            plan = plans(row["width"])[method]
            result["rows"][number] = {**run(method, plan, result["steps"]), "width": row["width"]}
            _tell(result["rows"][number])
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def _tell(row: dict[str, Any]) -> None:
    print(
        f"{row['width']!s:>5} {row['method']:18} {row['bits']:5.2f} bits   world perplexity "
        f"{row['start_perplexity']:9.3f} → {row['end_perplexity']:9.3f}   "
        f"{TASK} {row['exact_match']:5.0%} (loss {row['loss']:.3f})   {row['cpu_seconds']:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
