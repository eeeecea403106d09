"""The optimizers of `TrainSettings.optimizer`: the same trajectory, small moments, exact resume, clear refusals."""

from __future__ import annotations

import builtins
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_world import attached, llama, settings, straight_and_resumed, texts

import rankloom as rl
from rankloom.core.plan import Plan
from rankloom.errors import MissingExtra, SettingsError, StateError
from rankloom.optim.paged import PagedAdamW, Pager
from rankloom.optim.state import optimizer_state, restore_optimizer
from rankloom.train.fit import fit
from rankloom.train.optim import build_optimizer
from rankloom.train.settings import TrainSettings

WIDE = Plan(rl.LoRA(r=160), target_modules=("o_proj", "up_proj"))
"""Factors of more than 4096 numbers: bitsandbytes keeps smaller ones in float32."""


def parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (3,), (4, 4), (40, 30))]


def walk(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator)
            p.grad = None if (step, i) == (1, 2) else g
        optimizer.step()


class Everywhere(PagedAdamW):
    """Pages on the CPU too, as it does on a GPU."""

    def _pages(self, parameter: torch.Tensor) -> bool:
        return True


@pytest.mark.parametrize("cls", [PagedAdamW, Everywhere])
@pytest.mark.parametrize("budget", [0, 400, 1 << 20])
def test_paged_is_adamw_bit_for_bit(cls: Any, budget: int) -> None:
    mine, theirs = parameters(), parameters()
    paged = cls([{"params": mine[:2], "lr": 1e-2}, {"params": mine[2:]}], weight_decay=0.1, budget=budget)
    plain = torch.optim.AdamW([{"params": theirs[:2], "lr": 1e-2}, {"params": theirs[2:]}], weight_decay=0.1)
    walk(paged, mine, 12)
    walk(plain, theirs, 12)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    paged.flush()
    for a, b in zip(mine, theirs):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(paged.state[a][name], plain.state[b][name])


def test_pages_keep_to_their_budget() -> None:
    """The least recently used goes first and is written back; one that alone is too big comes and goes."""
    a, b, c = (torch.zeros(8), torch.zeros(8), torch.zeros(8))
    pager = Pager(budget=64)
    for key, host in (("a", a), ("b", b)):
        (copy,) = pager.take(key, (host,), torch.device("cpu"))
        copy.add_(1)
    assert not a.any()
    assert pager.bytes == 64
    pager.take("a", (a,), torch.device("cpu"))[0].add_(1)
    pager.take("c", (c,), torch.device("cpu"))
    assert pager.keys == ("a", "c")
    assert b.eq(1).all()
    assert not a.any()
    pager.flush()
    assert a.eq(2).all()
    assert pager.bytes == 0
    big = torch.zeros(100)
    pager.take("big", (big,), torch.device("cpu"))[0].add_(3)
    pager.take("a", (a,), torch.device("cpu"))
    assert pager.keys == ("a",)
    assert big.eq(3).all()


def test_pages_of_replaced_memory_are_dropped() -> None:
    """Memory that was put in the place of the old one is what is used next."""
    old, new = torch.zeros(4), torch.full((4,), 5.0)
    pager = Pager(budget=1 << 10)
    pager.take("a", (old,), torch.device("cpu"))[0].add_(1)
    assert pager.take("a", (new,), torch.device("cpu"))[0].eq(5).all()


def test_state_dicts_fit_each_other() -> None:
    """Six steps, saved; six more with either optimizer are those that torch's would have made."""
    mine, theirs = parameters(), parameters()
    paged, plain = Everywhere(mine, budget=300), torch.optim.AdamW(theirs)
    walk(paged, mine, 6)
    walk(plain, theirs, 6)
    third, fourth = parameters(5), parameters(6)
    one, two = Everywhere(third, budget=300), torch.optim.AdamW(fourth)
    with torch.no_grad():
        for p, q, now in zip(third, fourth, mine):
            p.copy_(now), q.copy_(now)
    one.load_state_dict(copy.deepcopy(plain.state_dict()))  # torch shares what it loads
    two.load_state_dict(copy.deepcopy(paged.state_dict()))
    for optimizer, params in ((one, third), (two, fourth), (plain, theirs)):
        walk(optimizer, params, 6, seed=2)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(theirs, third, fourth))


def test_restore_is_exact_while_pages_are_out() -> None:
    """`optimizer_state` sees what pages hold; what is restored is not overwritten by old pages."""
    mine, fresh = parameters(), parameters()
    named = dict(zip("abcd", mine))
    paged = Everywhere(mine, budget=1 << 20)
    walk(paged, mine, 3)
    saved = optimizer_state(paged, named)
    kept = {k: {n: v.clone() for n, v in m.items()} for k, m in saved["state"].items()}
    saved["state"] = kept
    weights = [p.detach().clone() for p in mine]
    walk(paged, mine, 4, seed=3)
    after = [p.detach().clone() for p in mine]
    with torch.no_grad():
        for p, w in zip(mine, weights):
            p.copy_(w)
    restore_optimizer(paged, named, saved)
    walk(paged, mine, 4, seed=3)
    assert all(torch.equal(p, w) for p, w in zip(mine, after))
    assert not any(torch.equal(p, w) for p, w in zip(mine, fresh))


def same_files(out: Path) -> bool:
    def read(which: str) -> list[bytes]:
        newest = sorted((out / which / "checkpoints").iterdir())[-1]
        return [(newest / f).read_bytes() for f in ("weights.safetensors", "state.safetensors")]

    return read("straight") == read("broken")


@pytest.mark.parametrize("optimizer", ["paged_adamw", "adamw_8bit"])
def test_resumes_exactly(optimizer: str, tmp_path: Path) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    chosen = settings(optimizer=optimizer)
    (_, one), (_, two) = straight_and_resumed(llama, {"default": WIDE}, texts, chosen, out=tmp_path)
    assert len(one.losses) == len(two.losses) == 12
    assert one.losses == two.losses
    assert same_files(tmp_path)


def test_paged_run_is_the_plain_run() -> None:
    losses = [
        fit(attached(llama, {"default": WIDE}, 1), texts(), settings=settings(optimizer=name)).losses
        for name in ("adamw", "paged_adamw")
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_eight_bit_moments_are_small_and_near() -> None:
    """A quarter of the bytes and near the losses of full precision."""
    pytest.importorskip("bitsandbytes")
    plain = fit(attached(llama, {"default": WIDE}, 1), texts(), settings=settings()).losses
    small = fit(attached(llama, {"default": WIDE}, 1), texts(), settings=settings(optimizer="adamw_8bit")).losses
    assert small != plain
    assert small == pytest.approx(plain, rel=0.05)
    p = nn.Parameter(torch.randn(64, 128))
    optimizer = build_optimizer([{"params": [p]}], TrainSettings(optimizer="adamw_8bit"))
    p.grad = torch.randn_like(p)
    optimizer.step()
    held = {k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor) and not k.startswith("qmap")}
    assert sum(v.numel() * v.element_size() for v in held.values()) < 0.27 * 8 * p.numel()


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No such optimizer, no GPU, no bitsandbytes, one that cannot step here, and a checkpoint of another."""
    with pytest.raises(SettingsError, match="did you mean 'paged_adamw'"):
        TrainSettings(optimizer="paged_adm")  # type: ignore[arg-type]
    groups = [{"params": parameters()}]
    bnb = pytest.importorskip("bitsandbytes")
    with pytest.raises(SettingsError, match="the model is on the CPU: use 'adamw_8bit'"):
        build_optimizer(groups, TrainSettings(optimizer="paged_adamw_8bit"))

    def broken(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel")

    with monkeypatch.context() as patch:
        patch.setattr(bnb.optim.AdamW8bit, "step", broken)
        with pytest.raises(SettingsError, match=r"cannot step on cpu \(no kernel\)"):
            build_optimizer(groups, TrainSettings(optimizer="adamw_8bit"))
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        with pytest.raises(MissingExtra, match=r"optimizer='adamw_8bit' needs .*rankloom\[bnb\]"):
            build_optimizer(groups, TrainSettings(optimizer="adamw_8bit"))
    model = attached(llama, {"default": WIDE}, 1)
    fit(model, texts(), settings=settings(steps=2), out=tmp_path)
    with pytest.raises(StateError, match="optimizer='paged_adamw', but the checkpoint was made with optimizer='adamw'"):
        fit(model, texts(), settings=settings(steps=4, optimizer="paged_adamw"), out=tmp_path, resume=True)
