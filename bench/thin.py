"""A training step of every thin form beside PEFT's: two blocks of model "M", 4 × 256 tokens, one thread.

OMP_NUM_THREADS=1 python bench/thin.py [rounds] [fp32|bf16]    ratios of CPU time to the limit, medians of interleaved
rounds, and bytes kept for backward; writes bench/results/thin.json. PEFT has no DyLoRA and no HydraLoRA: beside them
stands its LoRA of the same rank.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

import torch
from _measure import RESULTS, interleaved, ratios
from _model_m import ALPHA, RANK, TARGETS, base, batch, limit, lora, ours, peft, step
from torch import nn

import rankloom as rl
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
from rankloom.ops.kept import kept_bytes

SHAPE = {"num_hidden_layers": 2, "vocab_size": 2048}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 5
Pair = tuple[nn.Module, nn.Module]


def two(model: nn.Module) -> Pair:
    """Two active adapters, both trained."""
    mine, config = copy.deepcopy(model), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    for name in ("a", "b"):
        rl.attach(mine, lora(), name, target_modules=TARGETS)
    mine.rankloom.use("a", "b")
    theirs = get_peft_model(copy.deepcopy(model), config, "a")
    theirs.add_adapter("b", config)
    theirs.base_model.set_adapter(["a", "b"])
    return mine, theirs


def in_four_bits(model: nn.Module) -> nn.Module:
    """The linear layers of the blocks as bitsandbytes' NF4."""
    import bitsandbytes as bnb

    model = copy.deepcopy(model)
    for block in model.modules():
        for name, layer in list(block.named_children()):
            if name in TARGETS:
                made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
                made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                setattr(block, name, made.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def pairs(model: nn.Module) -> dict[str, Pair]:
    """Ours and PEFT's by name."""

    def theirs(config: type, **settings: Any) -> nn.Module:
        return get_peft_model(copy.deepcopy(model), config(target_modules=TARGETS, **settings))

    dropped = lora(lora_dropout=0.05)
    adaptive = {"init_r": RANK, "target_r": RANK // 2}
    return {
        "LoRA": (ours(model, lora()), peft(model)),
        "LoRA with bias": (ours(model, lora(lora_bias=True)), peft(model, lora_bias=True)),
        "LoRA dropout": (ours(model, dropped), peft(model, lora_dropout=0.05)),
        "two LoRAs": two(model),
        "VeRA r=256": (ours(model, rl.VeRA(r=256)), theirs(VeraConfig, r=256)),
        "AdaLoRA": (ours(model, rl.AdaLoRA(**adaptive)), theirs(AdaLoraConfig, total_step=1000, **adaptive)),
        "DyLoRA": (ours(model, rl.DyLoRA(r=RANK)), peft(model)),
        "HydraLoRA 4 × 4": (ours(model, rl.hydralora(r=4, n_b=4)), peft(model)),
        "DoRA": (ours(model, rl.DoRA(lora())), peft(model, use_dora=True)),
        "DoRA dropout": (ours(model, rl.DoRA(dropped)), peft(model, use_dora=True, lora_dropout=0.05)),
    }


def measured(found: dict[str, Pair], floor: nn.Module, rounds: int) -> list[dict[str, Any]]:
    ids = batch(words=SHAPE["vocab_size"])
    each = {"limit": floor}
    for name, (mine, theirs) in found.items():
        each |= {f"{name} ours": mine, f"{name} PEFT": theirs}
    steps = {name: step(model, ids) for name, model in each.items()}
    for run in steps.values():
        run()  # a first pass shows which layers read the same input
    times = ratios(interleaved(steps, rounds), to="limit")
    bytes_ = {
        name: kept_bytes([m(input_ids=ids, labels=ids, use_cache=False).loss], m.parameters())
        for name, m in each.items()
    }
    rows = []
    for name in found:
        row: dict[str, Any] = {"step": name}
        for whose in ("ours", "PEFT"):
            row[whose] = round(times[f"{name} {whose}"], 3)
            row[f"kept, {whose}"] = round(bytes_[f"{name} {whose}"] / bytes_["limit"], 3)
        rows.append(row)
    return rows


def main() -> None:
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    rows = []
    for label in sys.argv[2:] or DTYPES:
        model = base(DTYPES[label], **SHAPE)
        made = measured(pairs(model), limit(model), rounds)
        four = in_four_bits(model)
        of_four = {"LoRA on bitsandbytes NF4": (ours(four, lora()), peft(four))}
        made += measured(of_four, limit(four), rounds)
        for row in made:
            rows.append({"dtype": label, **row})
            print(*(f"{key} {value}  " for key, value in rows[-1].items()), flush=True)
    (RESULTS / "thin.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
