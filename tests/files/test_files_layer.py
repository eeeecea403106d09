"""The file layer: whole or not at all, verified when read, nothing read from outside, every operation can fail."""

from __future__ import annotations

import json
import os
import stat
import time

import pytest

from rankloom.errors import FileError
from rankloom.files import disk
from rankloom.files.folders import add_files, discard, read_folder, replace_file, sweep, write_folder
from rankloom.files.manifest import MANIFEST, read_manifest, sealed
from rankloom.files.reading import opened
from rankloom.files.strict import parse

OLD = sealed({"a": b"old", "b": b"old" * 10}, {"kind": "k", "n": 1})
NEW = sealed({"a": b"new", "c": b"new" * 10}, {"kind": "k", "n": 2})


def kinds(log):
    return [(op.kind, op.path.name if "part" not in op.path.name else "hidden") for op in log]


def test_the_order_of_operations(tmp_path):
    log = []

    def note(operation, perform):
        log.append(operation)
        perform()

    with disk.watched(note):
        write_folder(tmp_path / "x", OLD)
    files = [(kind, name) for name in ("a", "b", MANIFEST) for kind in ("write", "sync")]
    end = [("sync", "hidden"), ("rename", "hidden"), ("sync", tmp_path.name), ("remove", "hidden")]
    assert kinds(log) == [("make", "hidden"), *files, *end]
    assert log[1].data == b"old"


@pytest.mark.parametrize("short", [False, True])
def test_whichever_operation_fails_the_folder_is_the_old_or_the_new(short, tmp_path):
    target = tmp_path / "x"
    write_folder(target, OLD)
    failed = 0
    for at in range(30):
        count = iter(range(100))

        def failing(operation, perform, at=at, count=count):
            if next(count) == at:
                if short and operation.kind == "write":
                    operation.path.write_bytes(operation.data[:-1])
                raise OSError(28, "No space left on device")
            perform()

        try:
            with disk.watched(failing):
                write_folder(target, NEW)
        except OSError:
            failed += 1
        manifest, files = read_folder(target, "k")
        assert sealed(files, {"kind": "k", "n": manifest["n"]}) in (OLD, NEW)
        write_folder(target, OLD)
        sweep(tmp_path)
        assert os.listdir(tmp_path) == ["x"]
    assert failed == 10, "make, 3 × (write, sync), sync, exchange, sync"


def test_beside_and_adding_and_replacing(tmp_path):
    write_folder(tmp_path / "x", OLD)
    (tmp_path / "x" / "notes").write_text("mine")
    write_folder(tmp_path / "x", NEW, [tmp_path / "x" / "notes"])
    assert sorted(os.listdir(tmp_path / "x")) == ["a", "c", MANIFEST, "notes"]
    add_files(tmp_path / "x", {"d": b"1"})
    replace_file(tmp_path / "x" / "d", b"2")
    replace_file(tmp_path / "deep" / "er" / "e", b"3")
    assert (tmp_path / "x" / "d").read_bytes() + (tmp_path / "deep" / "er" / "e").read_bytes() == b"23"
    discard(tmp_path / "x")
    assert os.listdir(tmp_path) == ["deep"]


def test_sweeping_leaves_others_and_the_young(tmp_path):
    for name, age in ((".a.1.part", 100), (".a.2.part", 0), (".[a].3.part", 100), ("a.part", 100), (".a.part.d", 100)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    sweep(tmp_path, "a", 50)
    assert sorted(os.listdir(tmp_path)) == [".[a].3.part", ".a.2.part", ".a.part.d", "a.part"]
    sweep(tmp_path, "[a]")
    assert ".[a].3.part" not in os.listdir(tmp_path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_folder(tmp_path / "x", OLD)
        replace_file(tmp_path / "y", b"")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (*(tmp_path / "x").iterdir(), tmp_path / "y")} == {mode}
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o777 & ~umask


def test_every_flipped_bit_of_a_manifest_is_found():
    raw = OLD[MANIFEST]
    assert read_manifest(raw, "m", "k")["n"] == 1
    for bit in range(8 * len(raw)):
        broken = bytearray(raw)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FileError):
            assert read_manifest(bytes(broken), "m", "k") is not None


def test_what_a_manifest_refuses(tmp_path):
    write_folder(tmp_path / "x", OLD)
    with pytest.raises(FileError, match=r"a 'k' of schema 2; expected 'other'"):
        read_folder(tmp_path / "x", "other")
    assert read_manifest(b'{"name": "web app"}', "m", "k") is None
    for name in ("../a", "..", "", "a/b", MANIFEST):
        with pytest.raises(FileError, match="does not list names"):
            read_manifest(sealed({name: b""}, {"kind": "k"})[MANIFEST], "m", "k")
    (tmp_path / "x" / "a").write_bytes(b"olt")
    with pytest.raises(FileError, match="x/a: its SHA-256 is not"):
        read_folder(tmp_path / "x", "k")
    (tmp_path / "x" / MANIFEST).unlink()
    with pytest.raises(FileError, match="the folder was never finished"):
        read_folder(tmp_path / "x", "k")


def read(folder, name="f", limit=100):
    with opened(folder) as found:
        return found.read(name, limit)


def test_only_plain_files_of_the_folder_are_read(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "secret"
    (root / "sub").mkdir(parents=True)
    outside.write_text("secret")
    (root / "f").write_text("fine")
    (root / "inner").symlink_to("f")
    (root / "outer").symlink_to(outside)
    (root / "chain").symlink_to("outer")
    (root / "nothing").symlink_to("none")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "fifo")
    assert read(root) == read(root, "inner") == b"fine"
    for name, words in {
        "outer": "leaves the folder",
        "chain": "leaves the folder",
        "nothing": "link to nothing",
        "loop": "link to nothing",
        "fifo": "no regular file",
        "sub": "no regular file|cannot be opened",
        "none": "no such file",
    }.items():
        with pytest.raises(FileError, match=words):
            read(root, name)
    with pytest.raises(FileError, match="4 bytes; at most 3"):
        read(root, limit=3)
    with pytest.raises(FileError, match="no folder"):
        read(outside)


def test_a_hub_cache_is_read_through_its_links_and_no_other_repository(tmp_path):
    home = tmp_path / "models--me--x"
    for repository in (home, tmp_path / "models--me--y"):
        (repository / "blobs").mkdir(parents=True)
        (repository / "blobs" / "1").write_text(repository.name)
    snapshot = home / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "f").symlink_to("../../blobs/1")
    (snapshot / "g").symlink_to("../../../models--me--y/blobs/1")
    assert read(snapshot) == b"models--me--x"
    with pytest.raises(FileError, match="leaves the folder"):
        read(snapshot, "g")


def test_an_open_folder_stays_the_one_that_was_opened(tmp_path):
    write_folder(tmp_path / "x", OLD)
    with opened(tmp_path / "x") as found:
        assert not found.replaced()
        (tmp_path / "x").rename(tmp_path / "y")
        write_folder(tmp_path / "x", NEW)
        assert found.replaced()
        assert found.read("a", 9) == b"old"


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not JSON"),
        (b"\xff{}", "not JSON"),
        (b"[]", "expected a JSON object, got a list"),
        (b'{"a": 1, "a": 2}', "'a' is there twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' is there twice"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1e999}', "1e999 is no JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is no JSON number"),
        (b'{"a": ' + b"[" * 100_000, "nested deeper than 12"),
        (b'{"a":' * 100_000, "nested deeper than 12"),
        (b'{"' + b"\\" * 100_001, "not JSON"),
    ],
)
def test_strict_json_refuses(raw, words):
    start = time.process_time()
    with pytest.raises(FileError, match=words):
        parse(raw, "f")
    assert time.process_time() - start < 1


def test_strict_json_reads():
    data = {"a": [1, 2.5, None, True, "ü]]]]]]]]]]]]]]]"], '"[[[[[[[[[[[[[[[[': {}}
    assert parse(json.dumps(data).encode(), "f") == data
