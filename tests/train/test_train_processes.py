"""Two processes on one run: the losses, decisions and files of one process that does all of it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes_world as world
import pytest
from torch.utils.data import DataLoader, DistributedSampler

from rankloom.errors import SettingsError
from rankloom.train.checkpoint import steps_in
from rankloom.train.processes import Processes
from rankloom.train.report import read_metrics
from rankloom.train.settings import TrainSettings
from rankloom.train.stream import stream_of

pytestmark = pytest.mark.timeout(300)
"""Two processes start, and import what they need, beside whatever else the machine does."""
Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes work, with what one process left there for them."""
    out = tmp_path_factory.mktemp("processes")
    (out / "file").write_text("in the way")
    for name in ("lora", "adalora", "vera"):
        world.run(name, out=out / f"{name}-straight", save_every=3, keep=9)
        kept = Path("checkpoints") / "step-00000003"
        shutil.copytree(out / f"{name}-straight" / kept, out / f"{name}-one" / kept)
    shutil.copytree(out / "lora-one", out / "sharded")
    return out


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    """What each of two processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, world.__file__, str(folder)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [p.communicate(timeout=240)[1] for p in started]
    finally:
        for p in started:
            p.kill()
    assert [p.returncode for p in started] == [0, 0], "\n".join(text[-3000:] for text in said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def assert_alike(one: dict[str, Any], two: dict[str, Any], exact: bool) -> None:
    assert one.keys() == two.keys()
    for key, value in one.items():
        for a, b in zip(value.values(), two[key].values()) if isinstance(value, dict) else [(value, two[key])]:
            if exact and key != "metrics":
                assert a == b, key
            else:
                assert a == pytest.approx(b, rel=1e-9, abs=1e-12), key


@pytest.mark.parametrize("name", world.PLANS)
def test_two_processes_make_the_run_of_one(name: str, found: Found) -> None:
    alone = world.told(*world.run(name))
    assert alone["losses"][-1] != alone["losses"][0]
    for mine in found:
        assert_alike(mine[name], alone, exact=True)


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "adalora", "nf4", "lora+ and whole"])
def test_over_a_base_that_is_split(name: str, found: Found) -> None:
    for mine in found:
        assert_alike(mine[f"{name}, sharded"], found[0][name], exact=True)


@pytest.mark.parametrize("name", ["lora", "adalora", "vera"])
def test_saved_on_two_and_taken_up_by_one_and_back(name: str, folder: Path, found: Found, tmp_path: Path) -> None:
    straight = weights(folder / f"{name}-straight")
    kept = Path("checkpoints") / "step-00000003"
    assert weights(folder / f"{name}-two") == straight
    assert (folder / f"{name}-two" / kept / "weights.safetensors").read_bytes() == (
        folder / f"{name}-straight" / kept / "weights.safetensors"
    ).read_bytes()
    shutil.copytree(folder / f"{name}-two" / kept, tmp_path / kept)
    _, result = world.run(name, out=tmp_path, resume=True)
    assert weights(tmp_path) == straight
    assert weights(folder / f"{name}-one") == straight
    assert result.losses == found[0][f"{name}, taken up"]["losses"] == found[0][name]["losses"]


def test_a_split_base_takes_up_what_one_process_saved(folder: Path, found: Found) -> None:
    assert weights(folder / "sharded") == weights(folder / "lora-straight")
    assert found[1]["sharded, taken up"]["losses"] == found[0]["lora"]["losses"]


def weights(out: Path) -> bytes:
    root = out / "checkpoints"
    return (root / f"step-{steps_in(root)[-1]:08d}" / "weights.safetensors").read_bytes()


def test_one_process_writes_and_reports(folder: Path) -> None:
    events = [row["event"] for row in read_metrics(folder / "lora-two")]
    assert events.count("start") == events.count("end") == 1
    assert events.count("train") == world.STEPS
    assert steps_in(folder / "lora-two" / "checkpoints") == [3, 6]


def test_one_failure_ends_all_with_its_message(found: Found) -> None:
    main, other = (mine["torn data"] for mine in found)
    assert other == ["DataError", "shard-7.jsonl:12: no field 'text'"]
    assert main == ["PeerError", "process 1 of 2 failed: shard-7.jsonl:12: no field 'text'"]
    kind, message = found[1]["no room"]
    assert kind == "PeerError"
    assert message.startswith("process 0 of 2 failed:")


def test_what_is_not_the_same_everywhere_is_named(found: Found) -> None:
    for mine in found:
        kind, message = mine["other plan"]
        assert kind == "StateError"
        assert message.startswith("adapters is not the same in all processes")
        kind, message = mine["whole model, sharded"]
        assert kind == "SettingsError"
        assert "rankloom.attach" in message


def test_rules_draw_the_same_and_forward_passes_their_own(found: Found) -> None:
    one, two = (mine["random"] for mine in found)
    assert one["rules"] == two["rules"]
    assert len(set(one["rules"])) == 3
    assert not set(one["forward"]) & set(two["forward"])


def test_a_tensor_that_one_process_alone_used_moves_in_all(found: Found) -> None:
    with pytest.warns(UserWarning, match="no gradient after 4 steps in 2 of 6"):
        alone = world.branches(accumulate=2)
    for mine in found:
        assert mine["branches"] == alone


def test_gradients_under_the_wrapper_of_torch(found: Found) -> None:
    alone = world.by_hand(None)
    for mine in found:
        for name, gradients in alone.items():
            for key, gradient in gradients.items():
                assert mine["by hand"][name][key] == pytest.approx(gradient, rel=1e-12, abs=1e-15)


def test_batches_are_taken_in_turns_and_the_position_suits_any_number() -> None:
    two = [stream_of(list(range(5)), Processes(rank, 2)) for rank in range(2)]
    assert [[stream.next() for _ in range(4)] for stream in two] == [[0, 2, 4, 1], [1, 3, 0, 2]]
    for stream in two:
        one = stream_of(list(range(5)), Processes())
        one.restore(stream.state())
        assert one.next() == 3
        assert one.epoch == stream.epoch == 1


def test_a_sampler_that_deals_is_left_to_it() -> None:
    sampler = DistributedSampler(range(8), num_replicas=2, rank=1, shuffle=False)  # type: ignore[arg-type]
    loader = DataLoader(range(8), batch_size=2, sampler=sampler)  # type: ignore[arg-type]
    assert stream_of(loader, Processes(1, 2)).next().tolist() == [1, 3]


def test_settings_name_the_ways_to_split() -> None:
    with pytest.raises(SettingsError, match="sharding='fdsp': expected one of 'none', 'fsdp'; did you mean 'fsdp'"):
        TrainSettings(sharding="fdsp")


def test_one_process_has_nothing_to_split() -> None:
    with pytest.warns(UserWarning, match="nothing to split"):
        _, result = world.run("lora", sharding="fsdp")
    assert result.losses == world.run("lora")[1].losses
