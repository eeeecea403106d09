"""The gates on a GPU: a Llama of 1.1 B parameters in bf16, r=16 on its linear layers, beside PEFT's and the limit.

python bench/gpu.py [rows] [tokens]     8 × 1024 tokens by default; writes bench/results/gpu.json. Seconds are those of
a whole step with the device awaited, as ratios to the limit; medians of interleaved rounds. A host that cannot keep up
with the device is part of them; `captured` are forward and backward replayed as a CUDA graph, the limit's too: what the
device alone takes. G7 and G8 are wall time on the 504 layers of `plumbing.py`, medians of 3. Without a GPU it says so.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import flops
import mixed
import plumbing
import torch
from _measure import RESULTS, ROUNDS, Gate, interleaved, ratios, record
from _model_m import TARGETS, base, batch, limit, lora, ours, peft, step
from torch import Tensor, nn

import rankloom as rl
from rankloom.ops.kept import kept_bytes
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat

SHAPE = {
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
FILE = "gpu.json"
DROPOUT = 0.05
CAPTURED = ("LoRA ours", "LoRA PEFT, adapters in bf16", "DoRA ours", "DoRA PEFT, adapters in bf16")


def clock() -> float:
    """Wall seconds, once the device has done all that it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def whole(**settings: Any) -> nn.Module:
    with torch.device("cuda"):
        return base(torch.bfloat16, **SHAPE, **settings)


def in_nf4(model: nn.Module) -> nn.Module:
    """The adapted layers' weights in our NF4, doubly quantised."""
    names = [f"{name}.weight" for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in TARGETS]
    keep(model, dict.fromkeys(names, NormalFloat()))
    return model


def in_bitsandbytes(model: nn.Module) -> nn.Module | None:
    """The same in bitsandbytes' NF4; None where it is not installed."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return None
    for name, layer in list(model.named_modules()):
        if name.rsplit(".", 1)[-1] in TARGETS:
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4", module=new)
            model.set_submodule(name, new.to(layer.weight.device))
    model.is_loaded_in_4bit = True
    return model


def in_bf16(model: nn.Module) -> nn.Module:
    """Everything in bf16, the trained tensors too: faster, and small updates of theirs are lost."""
    return model.to(torch.bfloat16)


def variants(model: nn.Module) -> Mapping[str, Callable[[], nn.Module | None]]:
    def qlora_of_peft() -> nn.Module | None:
        made = in_bitsandbytes(whole())
        return None if made is None else peft(made)

    return {
        "limit": lambda: limit(model),
        "LoRA ours": lambda: ours(model, lora()),
        "LoRA ours, dropout": lambda: ours(model, lora(lora_dropout=DROPOUT)),
        "LoRA PEFT": lambda: peft(model),
        "LoRA PEFT, dropout": lambda: peft(model, lora_dropout=DROPOUT),
        "LoRA PEFT, adapters in bf16": lambda: in_bf16(peft(model)),
        "DoRA ours": lambda: ours(model, rl.DoRA(lora())),
        "DoRA PEFT": lambda: peft(model, use_dora=True),
        "DoRA PEFT, adapters in bf16": lambda: in_bf16(peft(model, use_dora=True)),
        "QLoRA ours": lambda: ours(in_nf4(whole()), lora()),
        "QLoRA PEFT": qlora_of_peft,
        "full fine-tuning": whole,
    }


def steps(rows: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """For each variant: its time as a ratio, MB that autograd keeps, MB of the peak of a step."""
    model, ids = whole(), batch(rows, tokens, SHAPE["vocab_size"]).cuda()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} B parameters, {rows} × {tokens} tokens", flush=True)
    runs: dict[str, Callable[[], object]] = {}
    found: dict[str, dict[str, float]] = {}
    for name, make in variants(model).items():
        variant = make()
        if variant is None:
            print(f"{name}: left out, bitsandbytes is not installed")
            continue
        try:
            run = step(variant, ids)
            run()  # shows which layers read the same input
            loss = variant(input_ids=ids, labels=ids, use_cache=False).loss
            kept = kept_bytes([loss], variant.parameters())
            del loss
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            peak = torch.cuda.max_memory_allocated() - before
        except torch.cuda.OutOfMemoryError:
            print(f"{name}: out of memory")
            del variant, run
            gc.collect()
            torch.cuda.empty_cache()
            continue
        runs[name], found[name] = run, {"kept_MB": kept / 1e6, "peak_MB": peak / 1e6}
    times = interleaved(runs, rounds, clock)
    for name, ratio in ratios(times, to="limit").items():
        found[name] |= {"ratio": ratio, "ms": 1e3 * sorted(times[name])[len(times[name]) // 2]}
        told = found[name]
        print(
            f"  {name:30} {ratio:6.3f} of the limit   {told['ms']:8.1f} ms   kept {told['kept_MB']:9.1f} MB"
            f"   peak {told['peak_MB']:9.1f} MB",
            flush=True,
        )
    return found


def captured(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Forward and backward as one CUDA graph, and the model, whose memory it reads, with it."""

    def once() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(beside)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once()

    def replay() -> None:
        assert model is not None
        graph.replay()

    return replay


def replays(rows: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """For some of the variants: the time of a replay, and its ratio to the limit's replay of the same rounds."""
    model, ids = whole(), batch(rows, tokens, SHAPE["vocab_size"]).cuda()
    made, floor = variants(model), captured(limit(model), ids)
    found: dict[str, dict[str, float]] = {}
    for name in CAPTURED:
        graph = captured(made[name](), ids)
        times = interleaved({"limit": floor, name: graph}, rounds, clock)
        found[name] = {"ratio": ratios(times, to="limit")[name], "ms": 1e3 * statistics.median(times[name])}
        found["limit"] = {"ratio": 1.0, "ms": 1e3 * statistics.median(times["limit"])}
        print(
            f"  {name:30} {found[name]['ratio']:6.3f} of the limit   {found[name]['ms']:8.1f} ms   captured", flush=True
        )
        del graph
        gc.collect()
        torch.cuda.empty_cache()
    return found


def gates(found: Mapping[str, Mapping[str, float]], replayed: Mapping[str, Mapping[str, float]]) -> list[Gate]:
    def of(name: str, key: str, to: str | None = None) -> float | None:
        if name not in found:
            return None
        return found[name][key] / (found[to][key] if to else 1)

    rows = []
    for name, method, bound in (("G2", "LoRA", 1.25), ("G3", "DoRA", 1.5)):
        rows.append(
            Gate(f"{name} {method} bf16 step", of(f"{method} ours", "ratio"), of(f"{method} PEFT", "ratio"), 1.0, bound)
        )
        alone = (replayed[f"{method} {who}"]["ratio"] for who in ("ours", "PEFT, adapters in bf16"))
        rows.append(Gate(f"{name} {method} bf16, captured", *alone, 1.0, bound))
    mine, theirs = (of(f"LoRA {who}, dropout", "kept_MB", f"LoRA {who}") for who in ("ours", "PEFT"))
    rows.append(Gate(f"G4 kept bytes, LoRA dropout {DROPOUT} to none", mine, theirs, None, 1.06))
    for method, bound in (("LoRA", 0.65), ("DoRA", 0.8)):
        mine, theirs = (of(f"{method} {who}", "kept_MB", "full fine-tuning") for who in ("ours", "PEFT"))
        rows.append(
            Gate(f"G5 kept bytes, {method} to full", mine, theirs, of("limit", "kept_MB", "full fine-tuning"), bound)
        )
    return rows


def batches() -> list[Gate]:
    """G9 with eight of the layers."""
    with torch.device("cuda"):
        made, rows = mixed.models(64, {**SHAPE, "num_hidden_layers": 8}, torch.bfloat16), []
    for tokens, what, bound in ((1, "decode", 2.3), (512, "prefill", 1.2)):
        found = mixed.measure(made, tokens, clock)
        rows.append(Gate(f"G9 {what}, 64 adapters in 64 rows", found["ours"], found["peft"], 1.0, bound))
    return rows


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing is measured. On a machine with one: python bench/gpu.py")
        return
    rows, tokens = (int(n) for n in sys.argv[1:3]) if len(sys.argv) > 2 else (8, 1024)
    found = steps(rows, tokens, ROUNDS)
    gc.collect()
    torch.cuda.empty_cache()
    replayed = replays(rows, tokens, ROUNDS)
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows, "tokens": tokens}
    (RESULTS / "gpu_steps.json").write_text(
        json.dumps({**about, "variants": found, "captured": replayed}, indent=1) + "\n"
    )
    gc.collect()
    torch.cuda.empty_cache()
    plain = whole(attn_implementation="eager")  # torch's counter refuses the fused attention of these
    counted = flops.gate(plain, batch(1, tokens, SHAPE["vocab_size"]).cuda())
    record([*gates(found, replayed), counted], FILE)
    record(batches(), FILE)
    record(plumbing.gates(plumbing.measured("cuda", clock, rounds=3), "ms"), FILE)


if __name__ == "__main__":
    main()
