"""Attach, select, silence and merge on 504 linear layers, beside PEFT in the same process (CPU milliseconds, medians).

OMP_NUM_THREADS=1 python bench/plumbing.py        writes bench/results/plumbing.json
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rankloom as rl
from peft import LoraConfig, get_peft_model

ROUNDS = 7
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 72,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 1000,
}
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def cpu_ms(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return 1e3 * (time.process_time() - started)


def silent_ours(bank: rl.Bank) -> None:
    with bank.using():
        pass


def silent_peft(model: object) -> None:
    with model.disable_adapter():  # type: ignore[attr-defined]
        pass


def main() -> None:
    torch.set_num_threads(1)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    config = LoraConfig(r=8, target_modules=NAMES)
    found: dict[str, dict[str, list[float]]] = {}

    def note(what: str, who: str, action: Callable[[], object]) -> None:
        found.setdefault(what, {"ours": [], "peft": []})[who].append(cpu_ms(action))

    for _ in range(ROUNDS):
        ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
        note("attach the first adapter", "ours", partial(rl.attach, ours, rl.LoRA(r=8), target_modules=NAMES))
        note("attach the first adapter", "peft", partial(get_peft_model, theirs, config))
    bank, peft = rl.attach(base_a := copy.deepcopy(base), rl.LoRA(r=8)), get_peft_model(copy.deepcopy(base), config)
    for i in range(15):
        rl.attach(base_a, rl.LoRA(r=8), name=f"a{i}")
        peft.add_adapter(f"a{i}", config)
    note("attach the 17th", "ours", lambda: rl.attach(base_a, rl.LoRA(r=8), name="last"))
    note("attach the 17th", "peft", lambda: peft.add_adapter("last", config))
    for i in range(ROUNDS):
        note("select one of 17", "ours", lambda i=i: bank.use(f"a{i}"))
        note("select one of 17", "peft", lambda i=i: peft.set_adapter(f"a{i}"))
        note("silence and back", "ours", lambda: silent_ours(bank))
        note("silence and back", "peft", lambda: silent_peft(peft))
        note("merge one", "ours", lambda: bank.merge("a3"))
        bank.unmerge()
        note("merge one", "peft", lambda: peft.merge_adapter(["a3"]))
        peft.unmerge_adapter()
    rows = [
        {"what": what, "ours_ms": round(o, 3), "peft_ms": round(p, 3), "ratio": round(o / p, 4)}
        for what, times in found.items()
        for o, p in [(statistics.median(times["ours"]), statistics.median(times["peft"]))]
    ]
    for row in rows:
        print(
            f"{row['what']:26} ours {row['ours_ms']:9.3f} ms   PEFT {row['peft_ms']:9.3f} ms   ratio {row['ratio']:.4f}"
        )
    out = Path(__file__).parent / "results" / "plumbing.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
