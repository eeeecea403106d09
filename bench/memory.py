"""G4, G5: bytes that autograd keeps for backward on model "M" (4 × 512 tokens, fp32), beside PEFT's and the limit.

OMP_NUM_THREADS=1 python bench/memory.py     distinct storages held after the forward pass, parameters not counted
"""

from __future__ import annotations

import torch
from _measure import Gate, record
from _model_m import base, batch, limit, lora, ours, peft
from torch import nn

import rankloom as rl
from rankloom.ops.kept import kept_bytes

DROPOUT = 0.05


def kept(model: nn.Module) -> int:
    ids = batch(tokens=512)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return kept_bytes([loss], model.parameters())


def main() -> None:
    torch.set_num_threads(1)
    model = base()
    full = kept(model)
    floor = kept(limit(model)) / full
    mine = {
        "LoRA": kept(ours(model, lora())),
        "LoRA dropout": kept(ours(model, lora(lora_dropout=DROPOUT))),
        "LoRA-FA": kept(ours(model, lora(frozen="A"))),
        "DoRA": kept(ours(model, rl.DoRA(lora()))),
    }
    theirs = {
        "LoRA": kept(peft(model)),
        "LoRA dropout": kept(peft(model, lora_dropout=DROPOUT)),
        "LoRA-FA": kept(peft(model, frozen_a=True)),
        "DoRA": kept(peft(model, use_dora=True)),
    }
    print("MB kept", {"full fine-tuning": full / 1e6, "limit": floor * full / 1e6})
    for name in mine:
        print(f"  {name:14} ours {mine[name] / 1e6:7.1f}   PEFT {theirs[name] / 1e6:7.1f}")
    record(
        [
            Gate(
                "G4 kept bytes, LoRA dropout 0.05 to none",
                mine["LoRA dropout"] / mine["LoRA"],
                theirs["LoRA dropout"] / theirs["LoRA"],
                None,
                1.06,
            ),
            Gate("G5 kept bytes, LoRA to full", mine["LoRA"] / full, theirs["LoRA"] / full, floor, 0.65),
            Gate("G5 kept bytes, LoRA-FA to full", mine["LoRA-FA"] / full, theirs["LoRA-FA"] / full, floor, 0.65),
            Gate("G5 kept bytes, DoRA to full", mine["DoRA"] / full, theirs["DoRA"] / full, floor, 0.8),
        ]
    )


if __name__ == "__main__":
    main()
