"""Head and cross entropy of a long vocabulary: by chunks beside all at once, in kept bytes, peak bytes and CPU time.

OMP_NUM_THREADS=1 python bench/long_vocabulary.py        one training step of a Llama with 32 000 words
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _measure import interleaved, ratios
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rankloom as rl
from rankloom.jobs.plan import saved_bytes
from rankloom.train.chunked_loss import ChunkedLoss
from rankloom.train.loss import Loss, default_loss

VOCABULARY, TOKENS, CHUNK = 32_000, (2, 256), 64
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
LOSSES: dict[str, Loss] = {"whole": default_loss, "chunks": ChunkedLoss(CHUNK)}


class Losing(nn.Module):
    """A model with its loss as one module."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, **batch: Tensor) -> Tensor:
        return self.loss(self.model, batch)


def world() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SHAPE))
    rl.attach(model, rl.LoRA(r=8), target_modules="all-linear")
    ids = torch.randint(VOCABULARY, TOKENS)
    return model, {"input_ids": ids, "labels": ids}


def step(model: nn.Module, batch: dict[str, Tensor], loss: Loss) -> float:
    model.zero_grad()
    value = loss(model, batch)
    value.backward()
    return float(value.detach())


def peak(name: str) -> int:
    """Bytes that one step adds to the resident memory of a fresh process at its peak."""
    out = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True).stdout
    return int(out.split()[-1])


def alone(name: str) -> None:
    model, batch = world()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    before = highest()
    step(model, batch, LOSSES[name])
    print(highest() - before)


def highest() -> int:
    """Bytes of the resident memory at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def main() -> None:
    torch.set_num_threads(1)
    model, batch = world()
    values = {name: step(model, batch, loss) for name, loss in LOSSES.items()}
    kept = {name: saved_bytes(Losing(model, loss), batch) for name, loss in LOSSES.items()}
    peaks = {name: peak(name) for name in LOSSES}
    times = ratios(interleaved({n: partial(step, model, batch, loss) for n, loss in LOSSES.items()}), to="whole")
    print(f"{TOKENS[0]} × {TOKENS[1]} tokens, {VOCABULARY} words, {CHUNK} tokens a chunk")
    print(f"loss         whole {values['whole']:.7f}   chunks {values['chunks']:.7f}")
    for what, (one, two) in {"kept bytes": kept.values(), "peak bytes": peaks.values()}.items():
        print(f"{what:12} whole {one:,}   chunks {two:,}   ratio {two / one:.3f}")
    print(f"CPU time     ratio {times['chunks']:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    alone(sys.argv[1]) if len(sys.argv) > 1 else main()
