"""Row 9: small files cannot take large resources."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import rankloom as rl
from rankloom.core import patterns
from rankloom.errors import RankloomError
from rankloom.formats import loading, numbers
from rankloom.formats import manifest as gate
from rankloom.formats.limits import Limits
from rankloom.formats.manifest import CONFIG, WEIGHTS
from rankloom.train.configfile import read_config
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.child import Outcome, forked
from reliability_board.files import growing
from reliability_board.files.world import (
    Files,
    bare,
    base,
    config_of,
    folder,
    good,
    joined,
    silent,
    split,
    with_config,
    write,
)

SECONDS, MEMORY = 0.5, 64 << 20
PATIENCE = 40.0
"""Seconds by the clock: the work of the child itself is what counts."""


def measure(budget: Budget) -> Finding:
    """Each file in a child: refused (or read) in half a second of CPU time and 64 MB."""
    faults, slowest, largest = [], 0.0, 0
    with folder() as root, silent():
        cases = [*_folders(root), *_grown(root, budget), *_yamls(root)]
        for name, job in cases:
            outcome = _best(job)
            seconds = outcome.value["seconds"] if outcome.value else outcome.seconds
            slowest, largest = max(slowest, seconds), max(largest, outcome.memory)
            if outcome.died:
                faults.append(f"{name}: {outcome.died.strip().splitlines()[-1]}")
            elif not _small(outcome):
                faults.append(f"{name}: {seconds:.2f} s, {outcome.memory >> 20} MB")
    figure = f"{len(cases)} files; at most {slowest:.2f} s and {largest / 1e6:.0f} MB; {len(faults)} faults"
    return Finding(not faults, figure, tuple(faults))


def _best(job: Callable[[], bool]) -> Outcome:
    """The best of three tries, for other work on the machine slows one down."""
    for _ in range(3):
        found = forked(functools.partial(_timed, job), PATIENCE, cpu=2)
        if found.died or _small(found):
            break
    return found


def _small(found: Outcome) -> bool:
    return bool(found.value) and found.value["seconds"] <= SECONDS and found.memory <= MEMORY


def _timed(job: Callable[[], bool]) -> dict[str, Any]:
    import time

    start = time.process_time()
    refused = job()
    return {"seconds": time.process_time() - start, "refused": refused}


def _folders(root: Path) -> Iterator[tuple[str, Callable[[], bool]]]:
    model = base()
    plain = bare(good())
    head, body = split(plain)
    first, native = min(head), _native(root)
    bomb = r"((((([\w.])+)+)+)+)+!"
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)}
    folders: dict[str, Files] = {
        "r of 1e9": with_config(plain, r=10**9),
        "r of 4096": with_config(plain, r=4096),
        "rank_pattern of 1e7": with_config(plain, rank_pattern={"q_proj": 10**7}),
        "a million patterns": with_config(plain, rank_pattern={f"m{i}": 8 for i in range(40_000)}),
        "a header of 99 MB": {**plain, WEIGHTS: joined(b"{" + b" " * (99 << 20) + b"}", b"")},
        "a header that says 2^60": {**plain, WEIGHTS: (1 << 60).to_bytes(8, "little") + b"{}"},
        "300,000 tensors": {**plain, WEIGHTS: joined(many, b"")},
        "20,000 tensors": {**plain, WEIGHTS: joined({**head, **dict(list(many.items())[:20_000])}, body)},
        "a config of 50 MB": {**plain, CONFIG: b'{"a":"' + b"x" * (50 << 20) + b'"}'},
        "a manifest of 50 MB": {**plain, "manifest.json": b'{"a":"' + b"x" * (50 << 20) + b'"}'},
        "a config 100,000 levels deep": {**plain, CONFIG: b'{"a":' * 100_000},
        "lists 400,000 levels deep": {**plain, CONFIG: b'{"a":' + b"[" * 400_000},
        "a header 100,000 levels deep": {**plain, WEIGHTS: joined(b'{"a":' * 100_000, b"")},
        "a million quotes": {**plain, CONFIG: b'{"a' + b'\\"' * 500_000},
        "a number of a million digits": {**plain, CONFIG: b'{"r":' + b"9" * 1_000_000 + b"}"},
        "a float of a million digits": {**plain, CONFIG: b'{"r":0.' + b"9" * 1_000_000 + b"}"},
        "a million keys twice": {**plain, CONFIG: b"{" + b'"a":1,' * 150_000 + b'"a":1}'},
        "a shape of 2^47": {**plain, WEIGHTS: joined({**head, first: {**head[first], "shape": [1 << 47]}}, body)},
        "a regex bomb in rank_pattern": with_config(plain, rank_pattern={bomb: 8}),
        "a regex bomb in alpha_pattern": with_config(plain, alpha_pattern={bomb: 8}),
        "a regex bomb in layers_pattern": with_config(plain, layers_to_transform=[7], layers_pattern=bomb),
        "a regex of half a megabyte": with_config(plain, rank_pattern={"a|" * 250_000 + "(": 8}),
        "layer_replication of 1e9": with_config(plain, layer_replication=[[0, 10**9]]),
        "layer_replication 20,000 times": with_config(plain, layer_replication=[[0, 2]] * 20_000),
        "token indices of 1e9": with_config(plain, trainable_token_indices=[10**9]),
        "100,000 token indices": with_config(plain, trainable_token_indices=list(range(100_000))),
        "100,000 target modules": with_config(plain, target_modules=[f"m{i}" for i in range(60_000)]),
        "layers_to_transform of 100,000": with_config(plain, layers_to_transform=list(range(100_000))),
        "total_step of 1e18": with_config(plain, peft_type="ADALORA", total_step=10**18),
        "VERA of r 1e9": with_config(plain, peft_type="VERA", r=10**9),
    }  # fmt: skip
    for field, value in {"n_b": 10**6, "r": 10**9}.items():
        plan = config_of(native)["plan"]
        folders[f"a native plan with {field} of {value}"] = with_config(
            native, plan={**plan, "method": {**plan["method"], field: value}}
        )
    folders["a native plan with a regex bomb"] = with_config(
        native, plan={**config_of(native)["plan"], "target_modules": bomb}
    )
    for name, (said, size) in _claims(head).items():
        place = write({**plain, WEIGHTS: joined(said, b"")}, root / name)
        os.truncate(place / WEIGHTS, (place / WEIGHTS).stat().st_size + size)
        yield name, functools.partial(_load, model, place)
    for name, files in folders.items():
        yield name, functools.partial(_load, model, write(files, root / name.replace("/", " ")))


def _grown(root: Path, budget: Budget) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Folders with regular expressions that nobody thought of, in every field that takes some."""
    model, plain, draw = base(), bare(good()), random.Random(budget.seed)
    for turn in range(budget.of(200, 6)):
        said = [f"{growing.expression(draw)}!" for _ in range(3)]
        fields = {"rank_pattern": {said[0]: 8}, "target_modules": said[1], "exclude_modules": said[2]}
        field = draw.choice(sorted(fields))
        place = write(with_config(plain, **{field: fields[field]}), root / f"grown {turn}")
        yield f"{field} {fields[field]}", functools.partial(_load, model, place)


def _claims(head: dict[str, Any]) -> dict[str, tuple[dict[str, Any], int]]:
    """Headers that claim gigabytes, and how many bytes; their files are sparse."""
    first = next(key for key in head if key != "__metadata__")
    end = max(said["data_offsets"][1] for said in head.values() if "data_offsets" in said)
    claims = {}
    for gigabytes in (2, 4):
        size = (gigabytes << 30) - (1 << 20)
        one = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
        more = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        claims[f"a sparse file of {gigabytes} GB"] = ({first: one}, size)
        claims[f"{gigabytes} GB beside honest tensors"] = ({**head, f"{first}.x": more}, end + size)
    return claims


def _native(root: Path) -> Files:
    model = base()
    rl.attach(model, rl.hydralora(r=2), target_modules=["q_proj"])
    rl.save(model, root / "native")
    return bare({path.name: path.read_bytes() for path in (root / "native").iterdir()})


def _load(model: torch.nn.Module, place: Path) -> bool:
    try:
        rl.load(model, place)
    except RankloomError:
        return True
    return False


def _yamls(root: Path) -> Iterator[tuple[str, Callable[[], bool]]]:
    laughs = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
    )
    texts = {
        "an alias bomb": laughs,
        "YAML 20,000 levels deep": "a: " + "[" * 20_000,
        "YAML of 20 MB": "a: " + "x" * (20 << 20),
    }
    for name, text in texts.items():
        path = root / f"{name}.yaml"
        path.write_text(text)
        yield name, functools.partial(_configure, path)


def _configure(path: Path) -> bool:
    try:
        read_config(path, [])
    except RankloomError:
        return True
    return False


def _reading(source: Any, expected: Any, model: Any) -> Any:
    source.tensors()
    return _check(source, expected, model)


_check = loading._check


@contextmanager
def _unlimited() -> Iterator[None]:
    """The limits of nobody."""
    huge = 1 << 62
    none = Limits(config=huge, header=huge, metadata=huge, file=huge, depth=huge, tensors=huge, rank=huge, count=huge)
    with swapped(gate, "Limits", lambda: none):
        yield


ROW = Row(
    9,
    "small files cannot take large resources",
    measure,
    (
        Sabotage("no limits", _unlimited),
        Sabotage("the numbers are read before the header is compared", lambda: swapped(loading, "_check", _reading)),
        Sabotage("long lists are not counted", lambda: swapped(numbers, "_check_entries", lambda *a: None)),
        Sabotage("`re` runs every regular expression", lambda: swapped(patterns, "WORK", 1 << 60)),
    ),
)
