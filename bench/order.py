"""The order of products at high ranks: two layers of model "M", 8 × 512 tokens, float32, one thread.

OMP_NUM_THREADS=1 python bench/order.py     ratios of CPU time to the limit, medians of interleaved rounds: ours, ours
with the thin order alone, PEFT's; writes bench/results/order.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from unittest import mock

import torch
from _measure import RESULTS, interleaved, ratios
from _model_m import TARGETS, base, batch, limit, ours, step
from torch import nn

import rankloom as rl
from peft import LoraConfig, get_peft_model
from rankloom.ops import fused
from rankloom.ops.order import Order

RANKS = (16, 256, 512)
ROUNDS = 5


def thin(run: Callable[[], None]) -> Callable[[], None]:
    def within() -> None:
        with mock.patch.object(fused, "cheapest", return_value=Order.THIN):
            run()

    return within


def peft(model: nn.Module, r: int) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS))


def main() -> None:
    torch.set_num_threads(1)
    shape, ids, rows = {"num_hidden_layers": 2}, batch(8, 512), []
    for r in RANKS:
        model = base(**shape)
        method = rl.LoRA(r=r, lora_alpha=r)
        steps = {
            "limit": step(limit(model), ids),
            "ours": step(ours(model, method), ids),
            "thin": thin(step(ours(model, method), ids)),
            "peft": step(peft(base(**shape), r), ids),
        }
        steps["ours"](), steps["thin"]()  # a first pass shows which layers read the same input
        found = ratios(interleaved(steps, ROUNDS), to="limit")
        rows.append({"r": r, **{name: round(found[name], 3) for name in ("ours", "thin", "peft")}})
        print(
            "r={r:4}   ours {ours:.3f}   thin {thin:.3f}   PEFT {peft:.3f}   (limit 1.000)".format(**rows[-1]),
            flush=True,
        )
    (RESULTS / "order.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
