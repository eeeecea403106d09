"""Writing: whole or not at all, over an old adapter, beside other files, with plain modes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from formats_tiny import X, adapted, net, saved, shake

import rankloom as rl
from rankloom.errors import FileError
from rankloom.files import disk

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"}


def names(folder):
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_modes_follow_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        saved(tmp_path / "a")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "a").iterdir()} == {mode}


def test_a_new_folder_has_four_files_and_nothing_is_left_beside_it(tmp_path):
    folder = saved(tmp_path / "deep" / "er" / "a")
    assert names(folder) == FILES
    assert names(folder.parent) == {"a"}


@pytest.mark.parametrize("atomic", [True, False])
def test_an_old_adapter_is_replaced_and_other_files_stay(atomic, tmp_path, monkeypatch):
    if not atomic:
        monkeypatch.setattr(disk.ctypes, "CDLL", lambda *a, **k: object())
    folder = saved(tmp_path / "a", target_modules=["q"])
    (folder / "notes.txt").write_text("mine")
    (folder / "logs").mkdir()
    (folder / "logs" / "1.txt").write_text("deep")
    (folder / "link").symlink_to("notes.txt")
    model = adapted()
    rl.save(model, folder)
    assert names(folder) == FILES | {"notes.txt", "logs", "link"}
    assert (folder / "logs" / "1.txt").read_text() == "deep"
    assert (folder / "link").read_text() == "mine"
    assert names(tmp_path) == {"a"}
    again = net()
    rl.load(again, folder)
    assert torch.equal(again(X), model(X))


def test_a_folder_of_other_files_gets_the_adapter_added(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    inode = (tmp_path / "run").stat().st_ino
    saved(tmp_path / "run")
    assert names(tmp_path / "run") == FILES | {"metrics.jsonl"}
    assert (tmp_path / "run").stat().st_ino == inode
    rl.load(net(), tmp_path / "run")


def test_what_a_killed_writer_left_is_swept_after_an_hour(tmp_path):
    for name, age in ((".a.1.part", 7200), (".a.2.part", 60), (".b.3.part", 7200)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    saved(tmp_path / "a")
    assert names(tmp_path) == {"a", ".a.2.part", ".b.3.part"}


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(FileError, match="is a file; an adapter needs a folder"):
        saved(tmp_path / "a")
    with pytest.raises(FileError, match=r"cannot write the adapter: (Not a directory|File exists)"):
        saved(tmp_path / "a" / "b")
    assert (tmp_path / "a").read_text() == "x"


@pytest.mark.parametrize("step", ["make", "write", "sync", "exchange"])
def test_a_failing_disk_leaves_the_old_adapter(step, tmp_path):
    folder = saved(tmp_path / "a", target_modules=["q"])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(operation, perform):
        if operation.kind == step:
            raise OSError(28, "No space left on device")
        perform()

    with disk.watched(full), pytest.raises(FileError, match="cannot write the adapter: No space left on device"):
        saved(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert names(tmp_path) == {"a"}


def test_no_permission(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(FileError, match="Permission denied"):
        saved(tmp_path / "a")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_while_saving_the_folder_is_one_of_the_two(tmp_path):
    folder = saved(tmp_path / "a")
    models = [adapted(), adapted()]
    shake(models[1].rankloom, size=2.0)
    wanted = [model(X) for model in models]
    for turn in range(15):
        child = os.fork()
        if child == 0:
            while True:
                for model in models:
                    rl.save(model, folder)
        time.sleep(0.002 + 0.0017 * turn)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        model = net()
        rl.load(model, folder)
        assert any(torch.equal(model(X), w) for w in wanted)
