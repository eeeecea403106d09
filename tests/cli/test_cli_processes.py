"""The real command under torchrun: one voice, one set of files, one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankloom.cli.command import speaks
from rankloom.errors import SettingsError
from rankloom.hf.models import device_of
from rankloom.jobs.runs import train_job
from rankloom.train.configfile import read_config


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*launch, "-m", "rankloom.cli", "train", *map(str, arguments)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_train_in_two_processes(sharding: str, model: Path, chats: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    same = [f"model={model}", f"data={chats}", "hold_out=4", "steps=3", "eval_answers=1", "lr=1e-2"]
    found = torchrun(*same, f"out={out}", "batch_size=2", f"sharding={sharding}", "chunked_loss=16", "--json")
    assert found.returncode == 0, found.stderr[-3000:]
    result = json.loads(found.stdout)
    alone = train_job(read_config(None, [*same, f"out={tmp_path / 'alone'}", "batch_size=4"])).result
    assert result["steps"] == alone.steps == 3
    assert result["tokens"] == alone.tokens
    assert alone.final_loss != alone.before["loss"]
    for mine, theirs in ((result["before"], alone.before), (result["after"], alone.after)):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert result["final_loss"] == pytest.approx(alone.final_loss, rel=1e-5)
    assert json.loads((out / "run.json").read_text())["after"] == result["after"]
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    rows = [json.loads(line)["event"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows.count("start") == rows.count("end") == 1


@pytest.mark.timeout(300)
def test_one_message_where_all_fail(model: Path, chats: Path, tmp_path: Path) -> None:
    found = torchrun(f"model={model}", f"data={chats}", f"out={tmp_path}", "target_modules=[nowhere]", "hold_out=3")
    assert found.returncode != 0
    assert found.stderr.count("error: target_modules: 'nowhere' matches nothing") == 1


def test_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert speaks()
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert speaks() == said


def test_a_device_by_number_is_refused_where_each_process_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="'cuda:1': each of the 2 processes has a device of its own"):
        device_of("cuda:1")
    assert device_of("cpu").type == "cpu"
