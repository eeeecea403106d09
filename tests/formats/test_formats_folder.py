"""Writing: whole or not at all, over an old adapter, beside other files, with plain modes."""

from __future__ import annotations

import contextlib
import errno
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
    """By the last time that anything in it was written to: a large file takes long, and its folder does not change."""
    for name, age, inside in ((".a.1.part", 7200, 7200), (".a.2.part", 60, 60), (".b.3.part", 7200, 7200),
                              (".a.4.part", 7200, 5)):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("half")
        os.utime(tmp_path / name / "x", (time.time() - inside,) * 2)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    saved(tmp_path / "a")
    assert names(tmp_path) == {"a", ".a.2.part", ".b.3.part", ".a.4.part"}


def test_what_a_killed_writer_left_inside_is_swept_too(tmp_path, monkeypatch):
    folder = saved(tmp_path / "a")
    left = folder / ".a.1.part"
    left.mkdir()
    os.utime(left, (time.time() - 7200,) * 2)
    saved(folder)
    assert names(folder) == FILES


def test_through_a_link_the_folder_behind_is_replaced(tmp_path):
    """A link to a folder, a chain of links, and a link to a folder that is not there yet."""
    real = saved(tmp_path / "real" / "a", target_modules=["q"])
    (tmp_path / "one").symlink_to("real/a")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    (tmp_path / "new").symlink_to("real/b")
    for link in ("one", "two", "new"):
        model = adapted()
        report = rl.save(model, tmp_path / link)
        assert (tmp_path / link).is_symlink()
        assert report.folder == (tmp_path / link).resolve()
        again = net()
        rl.load(again, report.folder)
        assert torch.equal(again(X), model(X))
    assert real.resolve() == real
    assert names(tmp_path / "real") == {"a", "b"}


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("fresh", [False, True])
def test_into_the_folder_where_this_process_stands(fresh, below, tmp_path, monkeypatch):
    folder = tmp_path / "a"
    (folder / "deep").mkdir(parents=True)
    if not fresh:
        saved(folder, target_modules=["q"])
    inode = folder.stat().st_ino
    monkeypatch.chdir(folder / "deep" if below else folder)
    model = adapted()
    rl.save(model, ".." if below else ".")
    assert folder.stat().st_ino == inode
    assert Path.cwd().exists()
    assert names(folder) == FILES | {"deep"}
    again = net()
    rl.load(again, ".." if below else ".")
    assert torch.equal(again(X), model(X))


MOUNTED = {
    "known": lambda folder, patch: patch.setattr(os.path, "ismount", lambda path: Path(path) == folder),
    "listed": lambda folder, patch: patch.setattr("rankloom.files.folders._mounts", lambda: [folder]),
    "parent read-only": lambda folder, patch: patch.setattr(
        os, "access", lambda path, mode, **_: Path(path) != folder.parent
    ),
}


def refusing(code):
    """A disk on which nothing beside the folder can be renamed."""

    def watch(operation, perform):
        if operation.kind in ("exchange",):
            raise OSError(code, os.strerror(code), str(operation.path))
        perform()

    return watch


@pytest.mark.parametrize("how", [*MOUNTED, errno.EXDEV, errno.EBUSY, errno.EROFS, errno.EPERM, errno.EACCES])
def test_a_folder_that_cannot_be_exchanged_is_filled_in_place(how, tmp_path, monkeypatch):
    """A mount, a bind mount of the same file system, a parent that is not ours, and whatever else the system says."""
    folder = saved(tmp_path / "a", target_modules=["q"])
    (folder / "notes.txt").write_text("mine")
    inode, log = folder.stat().st_ino, []
    if how in MOUNTED:
        MOUNTED[how](folder, monkeypatch)
    model = adapted()

    def watch(operation, perform):
        log.append(operation)
        (perform if how in MOUNTED else lambda: refusing(how)(operation, perform))()

    with disk.watched(watch):
        rl.save(model, folder)
    assert folder.stat().st_ino == inode
    assert names(folder) == FILES | {"notes.txt"}
    assert names(tmp_path) == {"a"}
    last = [op.to.name for op in log if op.kind == "rename"]
    assert last == ["manifest.json", "adapter_model.safetensors", "README.md", "adapter_config.json"]
    if how in MOUNTED:
        assert not [op for op in log if op.path.parent == tmp_path and op.kind != "sync"]
    again = net()
    rl.load(again, folder)
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("at", range(16))
def test_killed_while_filling_in_place_nothing_torn_is_loaded(at, sealed, tmp_path, monkeypatch):
    """Whatever operation is the last: the old adapter, the new one, or a refusal; over one without a manifest too."""

    class Killed(BaseException):
        pass

    folder = saved(tmp_path / "a", target_modules=["q"])
    old = net()
    rl.load(old, folder)
    if not sealed:
        (folder / "manifest.json").unlink()
    MOUNTED["known"](folder, monkeypatch)
    model, count = adapted(), iter(range(99))

    def watch(operation, perform):
        if next(count) >= at:
            raise Killed
        perform()

    with contextlib.suppress(Killed), disk.watched(watch):
        rl.save(model, folder)
    torn = 10 < at < 14
    again = net()
    with pytest.raises(FileError, match=r"manifest\.json") if torn else contextlib.nullcontext():
        rl.load(again, folder)
    if not torn:
        assert torch.equal(again(X), (old if at <= 10 else model)(X))


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
