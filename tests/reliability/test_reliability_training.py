"""What rows 10–16 are made of: the runs that they try, crashes of a disk, processes and their exit codes."""

from __future__ import annotations

import os
import random
import time

import pytest
import torch
import torch.distributed as dist
from reliability_board.training.crash import Disk, File, Folder
from reliability_board.training.process import start, together
from reliability_board.training.world import APART, RULES_APART, SETTINGS, World, plan_of, worlds

from rankloom import registry
from rankloom.files.disk import Operation

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the board forks")


def test_every_registered_method_and_rule_has_a_run():
    every = list(worlds())
    names = [world.name for world in every]
    assert len(set(names)) == len(names)
    assert registry.METHODS.keys() - APART <= set(names)
    heard = {type(r) for w in every for p in w.plans.values() for r in (*p.method.rules(), *p.rules)}
    heard |= {registry.load(registry.RULES[name]) for w in every for name in w.rules}
    assert heard >= {registry.load(target) for name, target in registry.RULES.items() if name not in RULES_APART}


@pytest.mark.parametrize(
    ("target", "runs"),
    [("rankloom.presets:rslora", {"mine"}), ("rankloom.methods.adalora:AdaLoRA", {"mine", "mine in two processes"})],
)
def test_a_method_joins_by_registering_and_one_with_a_memory_in_two_processes_too(target, runs, monkeypatch):
    monkeypatch.setitem(registry._METHODS, "mine", target)
    assert {world.name for world in worlds() if "mine" in world.name} == runs


def test_a_world_leaves_no_setting_at_rest(tmp_path):
    """Accumulation, dropout, warm-up, mid-epoch saves and evaluations are in every run."""
    assert SETTINGS.accumulate > 1
    assert SETTINGS.steps * SETTINGS.accumulate % 6
    rows = []
    result = World("lora", {"default": plan_of("lora")}).run(tmp_path, rows.append)
    assert sum(r["event"] == "save" for r in rows) == SETTINGS.steps
    assert len({r["lr"] for r in rows if r["event"] == "train"}) > 4
    assert result.losses[-1] != result.losses[0]


def paths(root, *names):
    return [root / name for name in names]


def test_a_crash_keeps_what_was_synced_and_may_keep_the_rest(tmp_path):
    """By hand: a written, synced file in a folder that was not synced; then the folder was."""
    file, model = tmp_path / "f", Disk(tmp_path)
    model.do(Operation("write", file, data=b"abcd"))
    found = [s.get(file, "not there") for s in model.states(64, random.Random(0))]
    assert set(found) == {"not there", b"abcd", b"", b"ab", b"abc", bytes(4), b"ab\0\0"}
    model.do(Operation("sync", file))
    assert {s.get(file, "not there") for s in model.states(64, random.Random(0))} == {"not there", b"abcd"}
    model.do(Operation("sync", tmp_path))
    assert [dict(s) for s in model.states(64, random.Random(0))] == [{file: b"abcd"}]


def test_a_crash_after_a_rename_and_a_removal(tmp_path):
    old, new, inner = paths(tmp_path, "old", "new", "old/f")
    model = Disk(tmp_path)
    for op in (
        Operation("make", old), Operation("write", inner, data=b"x"), Operation("sync", inner), Operation("sync", old),
        Operation("sync", tmp_path),
    ):  # fmt: skip
        model.do(op)
    assert list(model.states(64, random.Random(0))) == [{old: None, inner: b"x"}]
    model.do(Operation("rename", old, new))
    states = [dict(s) for s in model.states(64, random.Random(0))]
    assert len(states) == 2
    assert {old: None, inner: b"x"} in states
    assert {new: None, new / "f": b"x"} in states
    model.do(Operation("sync", tmp_path))
    model.do(Operation("remove", new))
    states = [dict(s) for s in model.states(64, random.Random(0))]
    assert {frozenset(s) for s in states} == {frozenset(), frozenset({new}), frozenset({new, new / "f"})}
    assert isinstance(model.top, Folder)
    assert not any(isinstance(n, File) for n in model.seen.values())


def test_exit_codes_are_as_a_shell_shows_them():
    assert start(lambda: None).end(20) == 0
    assert start(lambda: os._exit(7)).end(20) == 7
    assert start(lambda: 1 // 0).end(20) == 1
    assert start(lambda: os.kill(os.getpid(), 15)).end(20) == 143
    assert start(lambda: os.kill(os.getpid(), 2)).end(20) == 130
    assert start(lambda: exec("while True: pass")).end(0.2) is None


def test_processes_are_joined_and_one_that_loses_the_other_ends():
    def add():
        total = torch.ones(1)
        dist.all_reduce(total)
        os._exit(int(total))

    assert together(2, add) == [2, 2]
    assert together(1, lambda: os._exit(5)) == [5]
    assert together(2, lambda: add() if dist.get_rank() else time.sleep(60), lambda each: each[0].send(9)) == [137, 1]
