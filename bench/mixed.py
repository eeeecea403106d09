"""G9: a batch whose rows have adapters of their own, beside PEFT's `adapter_names` and the bare base.

Hidden 512, 8 layers, 64 rows, r=16, float32, one thread; CPU time as a ratio to the base forward of the same round.
OMP_NUM_THREADS=1 python bench/mixed.py        writes bench/results/gates.json and bench/results/mixed.json
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping

import torch
from _measure import RESULTS, Gate, interleaved, ratios, record
from _model_m import TARGETS, batch
from transformers import LlamaConfig, LlamaForCausalLM

import rankloom as rl
from peft import LoraConfig, get_peft_model

ROWS = 64
SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "intermediate_size": 1408,
    "vocab_size": 4096,
}
BOUNDS = {1: 2.3, 32: 1.2}
"""Tokens in a row → the largest ratio that passes at 64 adapters: decoding, prefill."""


Made = tuple[LlamaForCausalLM, rl.Bank, torch.nn.Module, list[str]]


def models(count: int, shape: Mapping[str, int] = SHAPE, dtype: torch.dtype = torch.float32) -> Made:
    """The base, ours and PEFT's with `count` adapters of the same numbers, and their names."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**shape)).to(dtype).eval().requires_grad_(False)
    names = [f"n{i}" for i in range(count)]
    ours, config = copy.deepcopy(base), LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS)
    theirs = get_peft_model(copy.deepcopy(base), config, names[0])
    for i, name in enumerate(names):
        bank = rl.attach(ours, rl.LoRA(r=16, lora_alpha=16), name, target_modules=TARGETS)
        if i:
            theirs.add_adapter(name, config)
        layers = dict(theirs.base_model.model.named_modules())
        for site in bank.sites(name):
            mine, peer = site.adapter, layers[site.name]
            for own, other in ((mine.A, peer.lora_A[name]), (mine.B, peer.lora_B[name])):
                torch.nn.init.normal_(own, std=0.02)
                other.weight.data.copy_(own.data)
    return base, bank, theirs.eval(), names


def measure(made: Made, tokens: int, clock: Callable[[], float] = time.process_time) -> dict[str, float]:
    """Ratios of ours and PEFT's to the base forward."""
    base, bank, theirs, names = made
    count = len(names)
    ids = batch(ROWS, tokens, base.config.vocab_size).to(base.device)
    rows = [names[i * count // ROWS] for i in range(ROWS)]
    bank.use(rows=rows)
    variants: dict[str, Callable[[], torch.Tensor]] = {
        "base": lambda: base(ids).logits,
        "ours": lambda: bank.model(ids).logits,
        "peft": lambda: theirs(input_ids=ids, adapter_names=rows).logits,
    }
    with torch.no_grad():
        said, wanted = variants["ours"]().float(), variants["peft"]().float()
        assert (said - wanted).norm() < (1e-4 if base.dtype == torch.float32 else 5e-2) * wanted.norm()
        found = ratios(interleaved(variants, clock=clock), to="base")
    return {name: found[name] for name in ("ours", "peft")}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for count in (8, 64):
        made = models(count)
        for tokens, what in ((1, "decode"), (32, "prefill")):
            found = measure(made, tokens)
            rows.append(
                {"what": what, "tokens": tokens, "adapters": count, **{k: round(v, 3) for k, v in found.items()}}
            )
            print(f"{what:8} {count:3} adapters   ours {found['ours']:.2f}   PEFT {found['peft']:.2f}   (base 1.00)")
    (RESULTS / "mixed.json").write_text(json.dumps(rows, indent=1) + "\n")
    last = {row["tokens"]: row for row in rows if row["adapters"] == 64}
    record(
        [
            Gate(f"G9 {row['what']}, 64 adapters in 64 rows", row["ours"], row["peft"], 1.0, BOUNDS[tokens])
            for tokens, row in last.items()
        ]
    )


if __name__ == "__main__":
    main()
