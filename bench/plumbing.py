"""G7 and G8: attach, load, select, disable, merge and combine on 504 linear layers, beside PEFT in the same process.

OMP_NUM_THREADS=1 python bench/plumbing.py        CPU milliseconds, medians; writes plumbing.json and gates.json

The bounds are milliseconds of a machine on which PEFT takes those of `PEFT_THERE`; elsewhere they are longer or
shorter as PEFT's are.
"""

from __future__ import annotations

import copy
import ctypes
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _measure import RESULTS, Gate, record
from transformers import LlamaConfig, LlamaForCausalLM

import rankloom as rl
from peft import LoraConfig, PeftModel, get_peft_model
from rankloom.compose.arithmetic import combine

ROUNDS = 7
SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 72,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 1000,
}
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
SUM = {"a0": 0.7, "a1": 0.3}
PEFT_THERE = {
    "attach the first adapter": 379,
    "load the first adapter": 477,
    "merge one": 105,
    "svd of a weighted sum": 4070,
}


class Table:
    """Milliseconds of `clock` by what is done and who does it."""

    def __init__(self, clock: Callable[[], float], rounds: int) -> None:
        self.clock, self.rounds = clock, rounds
        self.found: dict[str, dict[str, list[float]]] = {}

    def note(self, what: str, who: str, action: Callable[[], object]) -> None:
        started = self.clock()
        action()
        spent = 1e3 * (self.clock() - started)
        self.found.setdefault(what, {}).setdefault(who, []).append(spent)

    def of(self, what: str, who: str = "ours") -> float:
        return statistics.median(self.found[what][who])

    def rows(self) -> list[dict[str, object]]:
        pairs = {what: (self.of(what), self.of(what, "peft")) for what in self.found if "peft" in self.found[what]}
        return [
            {"what": what, "ours_ms": round(o, 3), "peft_ms": round(p, 3), "ratio": round(o / p, 4)}
            | ({"limit_ms": round(self.of(what, "limit"), 3)} if "limit" in self.found[what] else {})
            for what, (o, p) in pairs.items()
        ]


def disabled_ours(bank: rl.Bank) -> None:
    with bank.using():
        pass


def disabled_peft(model: PeftModel) -> None:
    with model.disable_adapter():
        pass


def shaken(model: torch.nn.Module, folder: str) -> str:
    """A saved adapter whose every tensor is nonzero."""
    bank = rl.attach(model, rl.LoRA(r=8), "saved", target_modules=NAMES)
    for _, parameter, _ in bank.tensors("saved"):
        torch.nn.init.normal_(parameter, std=0.02)
    rl.save(model, folder, "saved")
    rl.detach(model)
    return folder


def attach_and_load(table: Table, base: torch.nn.Module, folder: str) -> None:
    config = LoraConfig(r=8, target_modules=NAMES)
    for _ in range(table.rounds):
        ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
        table.note("attach the first adapter", "ours", partial(rl.attach, ours, rl.LoRA(r=8), target_modules=NAMES))
        table.note("attach the first adapter", "peft", partial(get_peft_model, theirs, config))
        ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
        table.note("load the first adapter", "ours", partial(rl.load, ours, folder))
        table.note("load the first adapter", "peft", partial(PeftModel.from_pretrained, theirs, folder))


def beside_sixteen(table: Table, base: torch.nn.Module, folder: str) -> tuple[rl.Bank, PeftModel]:
    """Models with adapters a0 to a15, and what loading the second and the seventeenth cost."""
    ours = copy.deepcopy(base)
    bank, peft = rl.load(ours, folder, "a0"), PeftModel.from_pretrained(copy.deepcopy(base), folder, "a0")
    for number in range(1, 16):
        if number == 1:
            loads(table, "load the 2nd", ours, peft, folder)
        rl.load(ours, folder, f"a{number}")
        peft.load_adapter(folder, f"a{number}")
    loads(table, "load the 17th", ours, peft, folder)
    config = LoraConfig(r=8, target_modules=NAMES)
    table.note("attach the 17th", "ours", lambda: rl.attach(ours, rl.LoRA(r=8), name="last"))
    table.note("attach the 17th", "peft", lambda: peft.add_adapter("last", config))
    return bank, peft


def loads(table: Table, what: str, ours: torch.nn.Module, peft: PeftModel, folder: str) -> None:
    for _ in range(table.rounds):
        table.note(what, "ours", lambda: rl.load(ours, folder, "new"))
        rl.detach(ours, "new")
    for _ in range(2):
        table.note(what, "peft", lambda: peft.load_adapter(folder, "new"))
        peft.delete_adapter("new")


@torch.no_grad()
def merge(table: Table, base: torch.nn.Module, folder: str) -> None:
    """One adapter into the base: again and again, each with the memory that the one before it let go (glibc gives it
    back to the system by luck; here it keeps it), and with none at hand, as the first merge of a process.
    """
    bank, peft = rl.load(copy.deepcopy(base), folder, "a"), PeftModel.from_pretrained(copy.deepcopy(base), folder, "a")
    thin = [(f.base.matrix().clone(), f.adapter) for f in bank.sites("a")]
    libc = ctypes.CDLL(None)
    trim = getattr(libc, "malloc_trim", lambda _: None)
    for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        getattr(libc, "mallopt", lambda *_: None)(threshold, 1 << 30)
    bank.merge("a")
    bank.unmerge()
    for what, let_go in (("merge one", lambda _: None), ("merge one, no memory at hand", trim)):
        for _ in range(table.rounds):
            let_go(0)
            table.note(what, "ours", lambda: bank.merge("a"))
            bank.unmerge()
            let_go(0)
            table.note(what, "peft", lambda: peft.merge_adapter(["a"]))
            peft.unmerge_adapter()
            let_go(0)
            table.note(what, "limit", lambda: [torch.addmm(w, t.B, t.A, alpha=t.scaling) for w, t in thin])


@torch.no_grad()
def switch_and_combine(table: Table, bank: rl.Bank, peft: PeftModel) -> None:
    for i in range(table.rounds):
        table.note("select one of 17", "ours", lambda i=i: bank.use(f"a{i}"))
        table.note("select one of 17", "peft", lambda i=i: peft.set_adapter(f"a{i}"))
        table.note("disable and enable", "ours", lambda: disabled_ours(bank))
        table.note("disable and enable", "peft", lambda: disabled_peft(peft))
        table.note("svd of a weighted sum", "ours", lambda: combine(bank, SUM, "sum"))
        rl.detach(bank.model, "sum")
    table.note("svd of a weighted sum", "peft", lambda: peft.add_weighted_adapter([*SUM], [*SUM.values()], "sum"))


def measured(device: str = "cpu", clock: Callable[[], float] = time.process_time, rounds: int = ROUNDS) -> Table:
    table, base = Table(clock, rounds), LlamaForCausalLM(LlamaConfig(**SHAPE)).to(device).eval()
    with tempfile.TemporaryDirectory() as room:
        folder = shaken(copy.deepcopy(base), str(Path(room) / "adapter"))
        attach_and_load(table, base, folder)
        merge(table, base, folder)
        switch_and_combine(table, *beside_sixteen(table, base, folder))
    return table


def gates(table: Table, unit: str = "CPU ms") -> list[Gate]:
    both = {what: (table.of(what), table.of(what, "peft")) for what in table.found}
    seventeenth, second = both["load the 17th"], both["load the 2nd"]
    merging = table.of("merge one", "limit")

    def here(what: str, bound: float) -> float:
        return bound * both[what][1] / PEFT_THERE[what]

    return [
        Gate(
            f"G7 attach 504 layers, {unit}",
            *both["attach the first adapter"],
            None,
            here("attach the first adapter", 80),
        ),
        Gate(f"G7 load 504 layers, {unit}", *both["load the first adapter"], None, here("load the first adapter", 120)),
        Gate("G7 load the 17th, ratio to the 2nd", *(a / b for a, b in zip(seventeenth, second)), 1.0, 1.2),
        Gate(f"G7 select one of 17, {unit}", *both["select one of 17"], None, 1),
        Gate(f"G7 disable and enable, {unit}", *both["disable and enable"], None, 1),
        Gate(f"G8 merge 504 layers, {unit}", *both["merge one"], merging, here("merge one", 70)),
        Gate(
            f"G8 svd of a weighted sum, {unit}",
            *both["svd of a weighted sum"],
            None,
            here("svd of a weighted sum", 200),
        ),
    ]


def main() -> None:
    torch.set_num_threads(1)
    table = measured()
    for row in table.rows():
        print(
            f"{row['what']:26} ours {row['ours_ms']:9.3f} ms   PEFT {row['peft_ms']:9.3f} ms   ratio {row['ratio']:.4f}"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plumbing.json").write_text(json.dumps(table.rows(), indent=1) + "\n")
    record(gates(table))


if __name__ == "__main__":
    main()
