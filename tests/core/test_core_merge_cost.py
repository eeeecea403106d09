"""Merging thin changes: one pass over each matrix, and the same numbers as through ΔW."""

from collections import Counter

import pytest
import torch
from core_tiny import adapted, difference, nudge, tower, words
from torch.utils._python_dispatch import TorchDispatchMode

import rankloom as rl
from rankloom.errors import StateError

NAMES = ["q_proj", "v_proj"]


class Operations(TorchDispatchMode):
    """What a block computes: how often each operation that makes or reads whole matrices ran."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.read = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.counts[name] += 1
        flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, torch.Tensor)]
        self.read[name] = max([self.read[name], *(t.numel() for t in flat)])
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_merge_is_one_product_into_a_fresh_tensor_and_nothing_else():
    _, bank = adapted("a", target_modules=NAMES)
    with Operations() as seen:
        bank.merge("a")
    assert seen.counts["addmm"] == 4
    finite = {"_foreach_norm", "_local_scalar_dense", "amax", "stack"}  # asked of the thin factors
    assert set(seen.counts) <= {"addmm", "detach", "alias", "promote_types"} | finite
    assert max(seen.read[name] for name in finite) < min(f.base.matrix().numel() for f in bank.sites("a"))


@torch.no_grad()
def test_values_whose_squares_overflow_are_merged_and_infinite_ones_are_not():
    model = tower().float()
    bank = rl.attach(model, rl.LoRA(r=2), "a", target_modules=NAMES)
    factor = next(bank.adapters())[1].A
    factor[0, 0] = 1e30
    bank.merge("a")
    bank.unmerge()
    factor[0, 0] = -torch.inf
    with pytest.raises(StateError, match=r"'.*:A' of the adapter 'a' has NaN or infinite values"):
        bank.merge("a")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merging_equals_adding_the_delta(dtype):
    model = tower().to(dtype)
    bank = rl.attach(model, rl.LoRA(r=2, lora_alpha=6), "a", target_modules=[*NAMES, "embed"])
    rl.attach(model, rl.LoRA(r=3, lora_bias=True), "b", target_modules=["q_proj"])
    nudge(bank)
    base = {f.name: f.base.matrix().double() for f in bank.sites("a")}
    changes = {name: bank.delta(name) for name in ("a", "b")}
    kept = {n: p for n, p in model.named_parameters() if "adapters" not in n}
    bank.merge(a=0.7, b=-0.5)
    for site in bank.sites("a"):
        wanted = base[site.name] + 0.7 * changes["a"][site.name].double()
        if site.name in changes["b"]:
            wanted = wanted - 0.5 * changes["b"][site.name].double()
        assert site.base.matrix().dtype == dtype
        assert difference(site.base.matrix().double(), wanted) < {8: 1e-14, 4: 1e-6, 2: 4e-3}[dtype.itemsize]
    bank.unmerge()
    assert all(p is kept[n] for n, p in model.named_parameters() if n in kept)


@torch.no_grad()
def test_no_parts_of_the_base_are_written():
    model, bank = adapted("a", "b", target_modules=NAMES)
    before = {n: p.clone() for n, p in model.named_parameters() if "adapters" not in n}
    out = model(words())
    bank.merge("a", "b")
    bank.unmerge()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert torch.equal(model(words()), out)
