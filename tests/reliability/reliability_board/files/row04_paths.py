"""Row 4: paths stay inside."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import nn

import rankloom as rl
from rankloom.core import attach as attaching
from rankloom.errors import RankloomError
from rankloom.files import manifest as manifests
from rankloom.files import reading
from rankloom.files.folders import read_folder, write_folder
from rankloom.files.manifest import MANIFEST, sealed
from rankloom.formats.manifest import CARD, CONFIG, WEIGHTS
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.child import forked
from reliability_board.files.world import Files, adapted, answer, bare, base, digest, folder, good, silent, write

SECONDS = 20.0
NAMES = (
    "..", ".", "", "/", "../x", "../../x", "a/b", "a/../b", "/etc/passwd", "//server/share", "\\\\server\\share",
    "a\\b", "..\\x",
    "C:\\x", "C:x", "file:///x", "~", "~root", "$HOME", "a\0b", "\0", "a\n", "\na", "a\nb", "a\r", "a\tb", " a", "a ",
    "a" * 65,
    "a" * 300, "ä", "а", "a\u202eb", "a\u200b", "\ud7ff",
    "。。", "．．", "%2e%2e", "..%2fx", "a:b", "a*", "a?", "a|b",
    "<a>", '"a"', "'a'", "`a`", "a;b", "a&b", "{a}", "[a]", "(a)", "a,b", "a.b", ".hidden", "..a", "a=b", "@a", "#a",
    "+a", "!a", "keys", "items", "values", "pop", "rows", "context", "forward", "training",
)  # fmt: skip
"""What cannot name an adapter."""
Job = Callable[[Path], str | None]
"""In a folder whose sibling is the canary: what went wrong, or None."""


def measure(budget: Budget) -> Finding:
    """Bad names, links, pipes, devices and swaps, each with a canary tree beside it that nobody may read or write."""
    faults, count = [], 0
    with silent():
        for name, job in _jobs(NAMES[:: budget.of(1, 6)]):
            count += 1
            with folder() as root:
                canary = write(good(adapted(base(), seed=9)), root / "canary")
                (root / "inside").mkdir()
                before = _tree(canary)
                found = forked(partial(job, root / "inside"), SECONDS)
                fault = found.died.strip().splitlines()[-1] if found.died else found.value
                fault = fault or ("the canary has changed" if _tree(canary) != before else None)
                fault = fault or ("files appeared outside" if set(os.listdir(root)) != {"canary", "inside"} else None)
                faults += [f"{name}: {fault}"] if fault else []
    return Finding(not faults, f"{count} names and paths; {len(faults)} that led outside or hung", tuple(faults))


def _tree(root: Path) -> str:
    content = [f"{p} {p.stat().st_size}".encode() + p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()]
    return hashlib.sha256(b"".join(content)).hexdigest()


def _jobs(names: Sequence[str]) -> list[tuple[str, Job]]:
    files, model = good(), base()
    listed = [name for name in NAMES[:40] if set(name) & set("/\\\0") or name in ("..", ".", "")]
    parts = (CONFIG, WEIGHTS, MANIFEST)
    found: dict[str, Job] = {
        **{f"attach as {name!r}": partial(_attach, model, name) for name in names},
        **{f"load as {name!r}": partial(_load_as, model, files, name) for name in names},
        **{f"manifest lists {name!r}": partial(_listed, name) for name in listed},
        **{
            f"{name} is {kind}": partial(_replaced, model, files, name, act)
            for name in parts
            for kind, act in _kinds(name).items()
        },
        **{f"{name} is swapped while it is opened": partial(_race, model, files, name) for name in parts},
        **{f"hub cache, {at}": partial(_hub, model, bare(files), at) for at in ("snapshots/abc", "snapshots/abc/sub")},
        **{f"saving over a link {name}": partial(_save_over, files, name) for name in (*parts, CARD)},
        **{f"saving beside a link {name}": partial(_save_beside, name) for name in (*parts, CARD)},
    }
    return list(found.items())


def _attach(model: nn.Module, name: str, inside: Path) -> str | None:
    try:
        rl.attach(model, rl.LoRA(r=2), name, target_modules=["q_proj"])
    except RankloomError:
        return None
    return "accepted"


def _load_as(model: nn.Module, files: Files, name: str, inside: Path) -> str | None:
    try:
        rl.load(model, write(files, inside / "a"), name)
    except RankloomError:
        return None
    return "accepted"


def _listed(name: str, inside: Path) -> str | None:
    written = sealed({"x": b"1"}, {"kind": "k"})
    hostile = sealed({name: b"1"}, {"kind": "k"})
    write_folder(inside / "c", {**written, MANIFEST: hostile[MANIFEST]})
    try:
        read_folder(inside / "c", "k")
    except RankloomError as error:
        return None if "does not list names" in str(error) else f"was looked for: {error}"
    return "read"


def _kinds(name: str) -> dict[str, Callable[[Path], None]]:
    def chained(path: Path) -> None:
        path.with_name("hop").symlink_to(f"../../canary/{name}")
        path.symlink_to("hop")

    def through_folder(path: Path) -> None:
        path.with_name("door").symlink_to("../../canary")
        path.symlink_to(f"door/{name}")

    def blobs(path: Path) -> None:
        path.symlink_to(f"../../canary/blobs/../{name}")

    def listening(path: Path) -> None:
        os.chdir(path.parent)
        socket.socket(socket.AF_UNIX).bind(path.name)

    return {
        "a link out": lambda path: path.symlink_to(f"../../canary/{name}"),
        "an absolute link": lambda path: path.symlink_to(path.parents[2] / "canary" / name),
        "a chain of links": chained,
        "a link through a linked folder": through_folder,
        "a link over blobs": blobs,
        "a link to itself": lambda path: path.symlink_to(name),
        "a pipe": lambda path: os.mkfifo(path),
        "a socket": listening,
        "a directory": lambda path: path.mkdir(),
        "an endless device": lambda path: path.symlink_to("/dev/zero"),
        "a terminal": lambda path: path.symlink_to("/dev/tty"),
        "the process": lambda path: path.symlink_to("/proc/self/mem"),
    }


def _replaced(model: nn.Module, files: Files, name: str, act: Callable[[Path], None], inside: Path) -> str | None:
    place = write(files, inside / "a")
    (place / name).unlink()
    act(place / name)
    try:
        rl.load(model, place)
    except RankloomError:
        return None
    return "loaded"


def _race(model: nn.Module, files: Files, name: str, inside: Path) -> str | None:
    """A second thread puts a link to the canary in the file's place, and the file back, again and again."""
    place, own = write(bare(files) if name != MANIFEST else files, inside / "a"), digest(answer(adapted(base())))
    spare, link = inside / "spare", inside / "link"
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            link.symlink_to(f"../../canary/{name}")
            os.replace(link, place / name)
            spare.write_bytes(files[name])
            os.replace(spare, place / name)

    worker = threading.Thread(target=flip, daemon=True)
    worker.start()
    try:
        for _ in range(15):
            try:
                rl.load(model, place)
            except RankloomError:
                continue
            if digest(answer(model)) != own:
                return "the canary was loaded"
            rl.detach(model)
    finally:
        stop.set()
        worker.join()
    return None


def _hub(model: nn.Module, files: Files, at: str, inside: Path) -> str | None:
    home = inside / "models--me--x"
    snapshot = home / at
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for name, data in files.items():
        (home / "blobs" / name).write_bytes(data)
        (snapshot / name).symlink_to(os.path.relpath(home / "blobs" / name, snapshot))
    rl.load(model, snapshot)
    return None if digest(answer(model)) == digest(answer(adapted(base()))) else "another adapter was loaded"


def _save_over(files: Files, name: str, inside: Path) -> str | None:
    place = write(files, inside / "a")
    (place / name).unlink()
    (place / name).symlink_to(f"../../canary/{name}")
    rl.save(adapted(base(), seed=4), place)
    return "the link is still there" if (place / name).is_symlink() else None


def _save_beside(name: str, inside: Path) -> str | None:
    place = inside / "run"
    place.mkdir()
    (place / "metrics.jsonl").write_text("{}")
    if name != CONFIG:
        (place / name).symlink_to(f"../../canary/{name}")
    rl.save(adapted(base(), seed=4), place)
    return "the link is still there" if (place / name).is_symlink() else None


ROW = Row(
    4,
    "paths stay inside",
    measure,
    (
        Sabotage("links are followed", lambda: swapped(reading, "_NO_LINK", 0)),
        Sabotage("pipes are waited for", lambda: swapped(reading, "_FLAGS", os.O_RDONLY)),
        Sabotage("any name names an adapter", lambda: swapped(attaching, "check_name", lambda *a: None)),
        Sabotage("manifests may list any path", lambda: swapped(manifests, "_lists_files", lambda files: True)),
    ),
)
