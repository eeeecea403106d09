"""Checkpoints: whole or not there, the newest good one wins, few are kept."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_world import attached, mlp, points, settings

import rankloom as rl
from rankloom.core.plan import Plan
from rankloom.errors import FileError, StateError
from rankloom.files import disk
from rankloom.train.checkpoint import load_checkpoint, newest_checkpoint, restore_weights, save_checkpoint, steps_in
from rankloom.train.fit import fit

PLAN = Plan(rl.LoRA(r=2))


def trained(out: Path, **changes: Any) -> Any:
    model = attached(mlp, {"default": PLAN}, 1)
    return model, fit(model, points(), settings=settings(**{"save_every": 3, "accumulate": 1, **changes}), out=out)


FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "manifest.json",
    "state.json",
    "state.safetensors",
    "weights.safetensors",
]


@pytest.mark.parametrize("damage", ["absent", "empty", "truncated", "flipped", "foreign", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_broken_newest_is_skipped_by_name(name: str, damage: str, tmp_path: Path) -> None:
    _, first = trained(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000012" / name
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "absent":
        flipped = bytes([*data[:40], data[40] ^ 1, *data[41:]])
        foreign = (tmp_path / "checkpoints" / "step-00000009" / name).read_bytes() + b" "
        path.write_bytes({"empty": b"", "truncated": data[:-3], "flipped": flipped, "foreign": foreign}[damage])
    again = attached(mlp, {"default": PLAN}, 1)
    with pytest.warns(UserWarning, match="broken") as told:
        result = fit(again, points(), settings=settings(accumulate=1), out=tmp_path, resume="auto")
    assert any("step-00000012 is broken and skipped" in str(w.message) for w in told)
    assert any("broken-step-00000012" in str(w.message) for w in told)
    assert result.losses == first.losses
    assert load_checkpoint(result.checkpoint).step == 12


def test_all_broken_starts_anew(tmp_path: Path) -> None:
    _, first = trained(tmp_path)
    for step in (9, 12):
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "state.json").write_text("{")
    model = attached(mlp, {"default": PLAN}, 1)
    with pytest.warns(UserWarning, match="broken") as told:
        second = fit(model, points(), settings=settings(accumulate=1), out=tmp_path, resume="auto")
    assert sum("is broken and skipped" in str(w.message) for w in told) == 2
    assert second.losses == first.losses
    assert steps_in(tmp_path / "checkpoints") == [10, 12]


def test_a_named_checkpoint_must_be_good(tmp_path: Path) -> None:
    trained(tmp_path)
    bad = tmp_path / "checkpoints" / "step-00000012"
    (bad / "weights.safetensors").write_bytes(b"x")
    model = attached(mlp, {"default": PLAN}, 1)
    with pytest.raises(FileError, match=r"weights\.safetensors: 1 bytes, the manifest says"):
        fit(model, points(), settings=settings(accumulate=1), out=tmp_path / "new", resume=str(bad))
    with pytest.raises(FileError, match="no checkpoint there"):
        fit(model, points(), settings=settings(accumulate=1), out=tmp_path / "new", resume=tmp_path / "nowhere")


def test_resume_from_a_path_into_a_new_folder(tmp_path: Path) -> None:
    _, first = trained(tmp_path / "one")
    model = attached(mlp, {"default": PLAN}, 1)
    old = tmp_path / "one" / "checkpoints" / "step-00000009"
    result = fit(model, points(), settings=settings(accumulate=1), out=tmp_path / "two", resume=old)
    assert result.losses == first.losses
    with pytest.raises(StateError, match="already holds checkpoints, the newest of step 12"):
        fit(model, points(), settings=settings(accumulate=1), out=tmp_path / "one", resume=old)


def test_a_new_run_does_not_write_over_an_old_one(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(StateError, match="resume='auto' to go on from there, or give another out="):
        trained(tmp_path)


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    losses = iter([5.0, 4.0, 1.0, 3.0, 3.0, 3.0, 3.0])
    model = attached(mlp, {"default": PLAN}, 1)
    result = fit(
        model, points(), out=tmp_path, evaluate=lambda m: next(losses),
        settings=settings(accumulate=1, save_every=2, eval_every=2, keep=2),
    )  # fmt: skip
    assert steps_in(tmp_path / "checkpoints") == [4, 10, 12]
    assert (result.best.step, result.best.loss) == (4, 1.0)
    assert result.best.folder == tmp_path / "checkpoints" / "step-00000004"
    assert result.metrics == {"before": {"loss": 5.0}, "after": {"loss": 3.0}}


def test_ends_with_the_best_weights(tmp_path: Path) -> None:
    seen: dict[int, Any] = {}
    steps = iter([0, 4, 8, 12, 99])

    def judge(model: Any) -> float:
        step = next(steps)
        seen[step] = {k: p.detach().clone() for k, p, _ in model.rankloom.tensors("default")}
        return {0: 9.0, 4: 1.0}.get(step, 2.0)

    model = attached(mlp, {"default": PLAN}, 1)
    chosen = settings(accumulate=1, eval_every=4, end_with="best")
    fit(model, points(), out=tmp_path, evaluate=judge, settings=chosen)
    for key, tensor, _ in model.rankloom.tensors("default"):
        assert torch.equal(tensor, seen[4][key])
        assert not torch.equal(seen[12][key], seen[4][key]) or not tensor.requires_grad
    assert all(torch.equal(seen[99][k], seen[4][k]) for k in seen[4])


def test_files_are_sealed_and_plain(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        trained(tmp_path)
    finally:
        os.umask(old)
    root = tmp_path / "checkpoints"
    newest = root / "step-00000012"
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["step"] == 12
    assert manifest["parent"] == "step-00000009"
    assert sorted(p.name for p in newest.iterdir()) == FILES
    assert sorted(manifest["files"]) == sorted({*FILES} - {"manifest.json"})
    assert {stat.S_IMODE(p.stat().st_mode) for p in newest.iterdir()} == {0o640}
    assert stat.S_IMODE(newest.stat().st_mode) == 0o750
    assert not [p for p in root.iterdir() if p.name.startswith(".")]


def test_a_checkpoint_is_an_adapter_folder(tmp_path: Path) -> None:
    model, result = trained(tmp_path)
    fresh = mlp()
    rl.load(fresh, result.checkpoint)
    for (key, mine, _), (_, its, _) in zip(
        model.rankloom.tensors("default"), fresh.rankloom.tensors("default"), strict=True
    ):
        assert torch.equal(mine, its), key
    assert rl.inspect(result.checkpoint).verified
    (result.checkpoint / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(FileError):
        rl.load(mlp(), result.checkpoint)


def test_peft_reads_a_checkpoint(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, result = trained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(mlp(), str(result.checkpoint)).eval()
    x = points()[0][0]
    assert torch.allclose(theirs(x), model.eval()(x), atol=1e-6)
    assert not torch.allclose(mlp()(x), model(x), atol=1e-3)


def test_several_adapters_and_unregistered_methods_make_plain_checkpoints(tmp_path: Path) -> None:
    class Mine(rl.LoRA):
        pass

    for out, plans in (("two", {"a": PLAN, "b": Plan(rl.LoRA(r=3))}), ("mine", {"a": Plan(Mine(r=2))})):
        model = attached(mlp, plans, 1)
        if out == "two":
            result = fit(model, points(), settings=settings(steps=2), out=tmp_path / out)
        else:
            with pytest.warns(UserWarning, match="no adapter folders: the plan cannot be written down"):
                result = fit(model, points(), settings=settings(steps=2), out=tmp_path / out)
        assert sorted(p.name for p in result.checkpoint.iterdir()) == sorted({*FILES} - set(FILES[:2]))


def test_a_checkpoint_that_is_removed_while_it_is_read_is_not_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    from rankloom.train import checkpoint

    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"w": torch.ones(1)}, {})
    read = checkpoint.load_checkpoint

    def late(folder: Path) -> Any:
        for step in (3, 4):
            if folder.name == "step-00000002" and not (tmp_path / f"step-{step:08d}").exists():
                save_checkpoint(tmp_path, step, {"w": torch.ones(1)}, {})
                checkpoint.prune(tmp_path, 2, ())
        return read(folder)

    monkeypatch.setattr(checkpoint, "load_checkpoint", late)
    assert newest_checkpoint(tmp_path).step == 4
    assert not recwarn.list


def test_nothing_that_is_not_finite_is_kept(tmp_path: Path) -> None:
    from rankloom.train.guard import DivergedError

    model = attached(mlp, {"default": PLAN}, 1)

    def poison(batch: int) -> Any:
        if batch == 2:
            with torch.no_grad():
                next(iter(model.rankloom.trainable()))[1].data[0, 0] = float("inf")
        return points()[batch]

    def blind(m: Any, batch: Any) -> torch.Tensor:
        return sum((p.clamp(-1, 1) ** 2).sum() for _, p, _ in m.rankloom.trainable())

    with pytest.raises(DivergedError, match=r"after step 3 these tensors are not finite: 'default/0:A'"):
        fit(model, poison, loss=blind, settings=settings(steps=4, accumulate=1, save_every=3), out=tmp_path)
    assert steps_in(tmp_path / "checkpoints") == []


def test_weights_of_another_shape_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    trained(tmp_path)
    found = newest_checkpoint(tmp_path / "checkpoints")
    other = attached(lambda: mlp(width=10), {"default": Plan(rl.LoRA(r=4))}, 1)
    before = [p.detach().clone() for _, p, _ in other.rankloom.tensors("default")]
    with pytest.raises(StateError, match=r"is \(2, 6\) torch.float32 in the checkpoint, \(4, 6\)"):
        restore_weights(other, found.weights)
    missing = {k: v for k, v in found.weights.items() if not k.endswith("2:A")}
    with pytest.raises(StateError, match="the model has the tensor 'default/2:A'"):
        restore_weights(attached(mlp, {"default": PLAN}, 1), missing)
    assert all(torch.equal(a, p) for a, (_, p, _) in zip(before, other.rankloom.tensors("default"), strict=True))


def test_adapters_take_the_ranks_of_a_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path)
    found = newest_checkpoint(tmp_path / "checkpoints")
    other = attached(mlp, {"default": Plan(rl.LoRA(r=4))}, 1)
    restore_weights(other, found.weights)
    mine = {f"default/{k}": p for k, p, _ in other.rankloom.tensors("default")}
    assert all(torch.equal(mine[k], t) for k, t in found.weights.items())


def test_a_state_that_is_no_data_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"rules/0 is a object"):
        save_checkpoint(tmp_path, 1, {}, {"rules": [object()]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", range(14))
def test_disk_errors_leave_the_old_checkpoint(call: int, tmp_path: Path) -> None:
    """The k-th disk operation of a save fails: the reader finds a whole checkpoint, the new or the one before."""
    save_checkpoint(tmp_path, 1, {"w": torch.ones(3)}, {"n": 1})
    count = iter(range(100))

    def failing(operation: disk.Operation, perform: Callable[[], None]) -> None:
        if next(count) == call:
            raise OSError(28, "No space left on device")
        perform()

    with disk.watched(failing):
        try:
            save_checkpoint(tmp_path, 2, {"w": torch.ones(3)}, {"n": 2})
            done = True
        except OSError:
            done = False
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.data["n"] == found.step
    assert found.step == 2 or not done
    assert done == (call >= 12), (
        "a folder, 4 files written and synced, the folder, the rename, the parent; no clean-up counts"
    )
    if call < 12:
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_replacing_a_folder_swaps_it_whole(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"w": torch.zeros(1)}, {})
    save_checkpoint(tmp_path, 1, {"w": torch.ones(1)}, {})
    assert newest_checkpoint(tmp_path).weights["w"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_while_saving_loses_nothing(tmp_path: Path) -> None:
    weights = {"w": torch.arange(200_000.0)}
    save_checkpoint(tmp_path, 1, weights, {"n": 1})
    for trial in range(8):
        child = os.fork()
        if child == 0:  # pragma: no cover - the child only writes until it is killed
            step = 2
            while True:
                save_checkpoint(tmp_path, step, weights, {"n": step})
                step += 1
        pause = 0.02 + 0.013 * trial
        signal.signal(signal.SIGALRM, lambda *_, child=child: os.kill(child, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, pause)
        os.waitpid(child, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        newest = newest_checkpoint(tmp_path)
        assert newest is not None
        assert newest.data["n"] == newest.step == steps_in(tmp_path)[-1]
    save_checkpoint(tmp_path, newest.step + 1, weights, {})
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_reader_leaves_a_writer_alone_and_a_new_run_sweeps(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoints", 1, {"w": torch.zeros(1)}, {})
    half = tmp_path / "checkpoints" / ".step-00000002.abc.part"
    half.mkdir()
    assert newest_checkpoint(tmp_path / "checkpoints").step == 1
    assert half.is_dir()
    (tmp_path / "checkpoints" / "step-00000001").rename(tmp_path / "elsewhere")
    trained(tmp_path)
    assert not half.exists()


def test_hostile_manifests_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"w": torch.zeros(1)}, {})
    path = tmp_path / "step-00000001" / "manifest.json"
    good = json.loads(path.read_text())
    entry = good["files"]["state.json"]
    for bad in (
        [], {}, {**good, "files": []}, {**good, "schema": 99}, {**good, "step": 2}, {**good, "kind": "x"},
        {**good, "files": {**good["files"], "../../secret": entry}}, {**good, "files": {"a": 3}},
        {**good, "files": {"state.json": entry}},
    ):  # fmt: skip
        path.write_text(json.dumps(bad))
        with pytest.raises(FileError):
            load_checkpoint(path.parent)
