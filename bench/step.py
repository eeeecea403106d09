"""G1–G3: a training step of LoRA and DoRA on model "M" (4 × 256 tokens, one thread) beside PEFT's and the limit.

OMP_NUM_THREADS=1 python bench/step.py [rounds] [fp32|bf16]    ratios of CPU time to the limit, medians of interleaved
rounds. On a CPU without bf16 instructions torch emulates them, and its products hide what is around them.
"""

from __future__ import annotations

import sys

import torch
from _measure import ROUNDS, Gate, interleaved, ratios, record
from _model_m import base, batch, limit, lora, ours, peft, step

import rankloom as rl

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOUNDS = {("LoRA", "fp32"): 1.08, ("LoRA", "bf16"): 1.25, ("DoRA", "fp32"): 1.25, ("DoRA", "bf16"): 1.5}
NAMES = {("LoRA", "fp32"): "G1", ("LoRA", "bf16"): "G2", ("DoRA", "fp32"): "G3", ("DoRA", "bf16"): "G3"}


def measured(dtype: torch.dtype, rounds: int) -> dict[str, float]:
    model, ids = base(dtype), batch()
    variants = {
        "limit": limit(model),
        "LoRA ours": ours(model, lora()),
        "LoRA PEFT": peft(model),
        "DoRA ours": ours(model, rl.DoRA(lora())),
        "DoRA PEFT": peft(model, use_dora=True),
    }
    steps = {name: step(variant, ids) for name, variant in variants.items()}
    steps["LoRA ours"]()  # a first pass shows which layers read the same input
    steps["DoRA ours"]()
    return ratios(interleaved(steps, rounds), to="limit")


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    gates = []
    for label in sys.argv[2:] or DTYPES:
        found = measured(DTYPES[label], rounds)
        for method in ("LoRA", "DoRA"):
            key = (method, label)
            name = f"{NAMES[key]} {method} {label} step"
            gates.append(Gate(name, found[f"{method} ours"], found[f"{method} PEFT"], found["limit"], BOUNDS[key]))
    record(gates)


if __name__ == "__main__":
    main()
