"""Random damage to an adapter's two files."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from rankloom.formats.manifest import CONFIG, WEIGHTS
from reliability_board.files.world import Files, config_of, joined, split

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 8, 16, 10**6, 10**18, 0.5, -1e308, "", "q_proj", ".*", "(a+)+", "LORA", [], [0],
    ["q_proj"],
    [[0, 1]], {}, {"q_proj": 8}, {"q_proj": {"x": [1]}}, "x" * 300,
)  # fmt: skip


def mutated(files: Mapping[str, bytes], draw: random.Random) -> tuple[str, Files]:
    """(what was done, the damaged files)."""
    act = draw.choice((_bytes, _bytes, _field, _field, _field, _entry, _entry, _key))
    return act.__name__.strip("_"), act(dict(files), draw)


def _bytes(files: Files, draw: random.Random) -> Files:
    name = draw.choice((CONFIG, WEIGHTS))
    data = bytearray(files[name])
    top = len(data) if name == CONFIG or draw.random() < 0.3 else 1200
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(top, max(1, len(data))))
        match draw.randrange(4):
            case 0:
                data[at : at + 1] = bytes([data[at] ^ 1 << draw.randrange(8)])
            case 1:
                del data[at : at + draw.randint(1, 9)]
            case 2:
                data[at:at] = draw.randbytes(draw.randint(1, 9))
            case _:
                data[at : at + 1] = draw.choice((b"{", b"}", b"[", b'"', b"\0", b"9", b",", b"\\"))
        if not data:
            break
    return {**files, name: bytes(data)}


def _field(files: Files, draw: random.Random) -> Files:
    from rankloom.formats.peft.fields import DESCRIPTIVE, NEUTRAL
    from rankloom.formats.peft.lora import Lora

    data = config_of(files)
    for _ in range(draw.randint(1, 3)):
        data[draw.choice(sorted({**DESCRIPTIVE, **NEUTRAL, **Lora.fields}))] = draw.choice(VALUES)
    return {**files, CONFIG: json.dumps(data).encode()}


def _entry(files: Files, draw: random.Random) -> Files:
    header, body = split(files)
    key = draw.choice(sorted(header))
    field = draw.choice(("dtype", "shape", "data_offsets"))
    other = header[draw.choice(sorted(header))][field]
    size = [draw.choice((0, 1, 8, 32, 256, 1 << 40)) for _ in range(draw.randint(0, 3))]
    header[key][field] = draw.choice(
        (other, size, draw.choice(VALUES), draw.choice(("F16", "F64", "I32", "BOOL", "U8")))
    )
    return {**files, WEIGHTS: joined(header, body)}


def _key(files: Files, draw: random.Random) -> Files:
    header, body = split(files)
    key = draw.choice(sorted(header))
    entry = header.pop(key)
    parts = key.split(".")
    at = draw.randrange(len(parts))
    parts[at] = draw.choice(
        ("", "0", "1", "9", "q_proj", "lora_A", "base_layer", "modules_to_save", "weight", "\ud83d"[:0] + "ü")
    )
    header[".".join(parts)] = entry
    return {**files, WEIGHTS: joined(header, body)}
