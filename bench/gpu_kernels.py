"""The Triton kernels on a GPU: time, and the part of the memory roofline that they reach. Without a GPU it says so.

python bench/gpu_kernels.py     writes bench/results/gpu_kernels.json. RANKLOOM_BANDWIDTH (GB/s) is the card's own
figure, else the bandwidth that a copy of 1 GB reaches here is the roofline.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from _measure import RESULTS

from rankloom.ops.segments import segments, stack
from rankloom.store.normalfloat import NormalFloat, looked_up

WIDTH, OUT, RANK = 4096, 4096, 16


def seconds(run: Callable[[], object], rounds: int = 50) -> float:
    """Median GPU seconds of one call, the cache of the card emptied before each."""
    spill = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    found = []
    for number in range(rounds + 5):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        spill.zero_()
        torch.cuda._sleep(1_000_000)  # so that all of `run` is queued before the device comes to it
        began.record()
        run()
        ended.record()
        torch.cuda.synchronize()
        if number >= 5:
            found.append(began.elapsed_time(ended) / 1e3)
    return sorted(found)[len(found) // 2]


def bandwidth() -> float:
    """Bytes per second of the roofline."""
    said = os.environ.get("RANKLOOM_BANDWIDTH")
    if said:
        return float(said) * 1e9
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), 20)


def mixed_batches() -> Iterator[tuple[str, Callable[[], object], Callable[[], object], int]]:
    """(name, kernel, one adapter after the other in torch, bytes that must move)."""
    from rankloom.ops.triton import segments as kernels

    for rows, adapters, tokens in ((64, 64, 1), (64, 8, 1), (8, 8, 512)):
        pairs = [
            (torch.randn(RANK, WIDTH, device="cuda") * 0.01, torch.randn(OUT, RANK, device="cuda"), 1.0)
            for _ in range(adapters)
        ]
        held, found = stack(pairs, torch.bfloat16), segments([i * adapters // rows for i in range(rows)])
        x = torch.randn(rows, tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
        y = torch.randn(rows, tokens, OUT, device="cuda", dtype=torch.bfloat16)

        def one_by_one(x=x, y=y, held=held, found=found, tokens=tokens) -> None:
            flat, out = x.view(-1, WIDTH), y.view(-1, OUT)
            for i, start, stop in found.runs:
                part = slice(start * tokens, stop * tokens)
                out[part].addmm_(flat[part] @ held.a[i].mT, held.b[i])

        moved = 2 * (held.a.numel() + held.b.numel() + x.numel() + 2 * y.numel())
        kernel = lambda x=x, y=y, held=held, found=found: kernels.added(y, x, found, held, 8)  # noqa: E731
        yield f"segments {rows} rows {adapters} adapters {tokens} tokens", kernel, one_by_one, moved


def packed_products() -> Iterator[tuple[str, Callable[[], object], Callable[[], object], int]]:
    """The same for 4-bit weights: read into bf16, and products without reading them into memory."""
    store, shape = NormalFloat(bits=4), torch.Size((OUT, WIDTH))
    weight = store.pack(torch.randn(shape, device="cuda", dtype=torch.bfloat16))

    def plainly() -> torch.Tensor:
        found = looked_up(weight.parts["codes"], store.scales(weight.parts), 4, store.block, shape)
        return found.to(torch.bfloat16)

    yield "4-bit weight read", weight.unpack, plainly, weight.stored_bytes + 2 * shape.numel()
    for rows in (1, 16, 64):
        x = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
        moved = weight.stored_bytes + 2 * (x.numel() + rows * OUT)
        kernel = lambda x=x: F.linear(x, weight)  # noqa: E731
        yield f"4-bit product {rows} rows", kernel, lambda x=x: F.linear(x, plainly()), moved


def bitsandbytes_products() -> dict[str, float]:
    """Seconds of bitsandbytes for the same, by name; empty where it is not installed."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        return {}
    made = bnb.nn.Linear4bit(WIDTH, OUT, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").cuda()
    found = {
        "4-bit weight read": seconds(lambda: bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state))
    }
    with torch.no_grad():
        for rows in (1, 16, 64):
            x = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
            found[f"4-bit product {rows} rows"] = seconds(lambda x=x: made(x))
    return found


def main() -> None:
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing is timed. On a machine with one: python bench/gpu_kernels.py")
        return
    limit, peers, rows = bandwidth(), bitsandbytes_products(), []
    for name, kernel, reference, moved in (*mixed_batches(), *packed_products()):
        mine, torchs, peer = seconds(kernel), seconds(reference), peers.get(name)
        part = moved / limit / mine
        us = {"us": 1e6 * mine, "torch_us": 1e6 * torchs, "bitsandbytes_us": peer and 1e6 * peer}
        rows.append({"what": name, **us, "roofline": part})
        beside = "" if peer is None else f"   bitsandbytes {1e6 * peer:7.1f} us"
        print(f"{name:44} {1e6 * mine:8.1f} us   torch {1e6 * torchs:8.1f} us{beside}   {part:6.1%} of roofline")
    found = {"device": torch.cuda.get_device_name(), "bytes_per_second": limit, "rows": rows, "python": sys.version}
    (RESULTS / "gpu_kernels.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
