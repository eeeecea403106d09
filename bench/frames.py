"""Python frames that a fused layer costs in a training step, forward and backward: counted, not timed.

python bench/frames.py     for each method: frames of a step beyond those of the frozen model, by adapted layer, and
those of the package's functions that are called most
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from _model_m import TARGETS, base, batch, limit, lora, ours, peft
from torch import nn

import rankloom as rl

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def frames(run: Callable[[], object]) -> Counter[str]:
    """The Python functions that are entered in this thread while `run` runs, by file and name."""
    found: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            code = frame.f_code
            found[f"{'/'.join(code.co_filename.split('/')[-2:])}:{code.co_name}"] += 1

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def of_a_step(model: nn.Module) -> Counter[str]:
    """Frames of forward and backward, once the model has learnt its groups. A CPU's backward runs in this thread."""
    ids = batch(2, 8, SHAPE["vocab_size"])

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    run(), run()
    return frames(run)


def main() -> None:
    torch.set_num_threads(1)
    model = base(**SHAPE)
    layers = SHAPE["num_hidden_layers"] * len(TARGETS)
    floor = of_a_step(limit(model)).total()
    variants = {
        "LoRA": ours(model, lora()),
        "LoRA dropout": ours(model, lora(lora_dropout=0.05)),
        "DoRA": ours(model, rl.DoRA(lora())),
        "VeRA": ours(model, rl.VeRA(r=16)),
        "LoRA PEFT": peft(model),
        "DoRA PEFT": peft(model, use_dora=True),
    }
    for name, variant in variants.items():
        found = of_a_step(variant)
        print(f"{name:14} {(found.total() - floor) / layers:6.1f} frames a layer")
        if "-v" in sys.argv:
            for function, times in found.most_common(60):
                if "site-packages" not in function:
                    print(f"    {times / layers:6.2f}  {function}")


if __name__ == "__main__":
    main()
