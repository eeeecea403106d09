"""Row 2: no parser has an uncaught exception, whatever the bytes."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rankloom.errors import MissingExtra, RankloomError
from rankloom.files import manifest as manifests
from rankloom.files import strict
from rankloom.files.manifest import read_manifest, sealed
from rankloom.formats import header as headers
from rankloom.formats import numbers
from rankloom.formats.header import LENGTH, header_size, read_header
from rankloom.formats.limits import Limits
from rankloom.formats.numbers import check_numbers
from rankloom.formats.peft import TRANSLATORS, fields
from rankloom.formats.peft.fields import read_fields
from rankloom.settings import engine, values, yamltext
from rankloom.train import configfile
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.child import Outcome, forked
from reliability_board.files import growing
from reliability_board.files.coverage import explore
from reliability_board.files.world import bare, good, silent

Parser = Callable[[bytes], object]
Grower = Callable[[random.Random], bytes]
CORPUS = Path(__file__).parent / "corpus"
FULL, QUICK, MINUTES, LED_SECONDS = 500_000, 1_500, 9.0, 60
RARE = 50
"""One input in so many is made of what was once a finding: some of these take long."""
WORDS = (
    b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\\u", b"null", b"true", b"NaN", b"1e999", b"-", b"0",
    b"9" * 30, b"\xff",
    b"\0", b"&a", b"*a", b"<<: ", b"!!python/name:os.system", b"- ", b"\n", b"\t", b'"shape"', b'"dtype"',
    b'"data_offsets"', b'"r"',
    b'"rank_pattern"', b'"target_modules"', b"(a+)+", b"plan:", b"method: ", b"? ", b"| ", b"#", b"'", b"\xe2\x80\xae",
)  # fmt: skip

VALUE = re.compile(rb'\[[^][{}]*\]|\{[^][{}]*\}|"[^"]*"|-?\d[\d.e]*|null|true|false')
VALUES = (
    b"null", b"true", b"0", b"-1", b"0.5", b"1e9", b'""', b'"r"', b"[]", b"[0,null]", b"[[1]]", b"{}", b'{"a":[1]}',
)  # fmt: skip


def config(raw: bytes) -> object:
    """adapter_config.json, up to the values of its fields."""
    data = strict.parse(raw, "config")
    check_numbers(data, "config", Limits())
    reader = TRANSLATORS.get(str(data.get("peft_type")), TRANSLATORS["LORA"])
    return read_fields(data, reader.fields, "config")


def weights(raw: bytes) -> object:
    """A weights file, up to its tensors."""
    length = header_size(raw[:LENGTH], len(raw), "weights", Limits())
    return read_header(raw[LENGTH : LENGTH + length], len(raw) - LENGTH - length, "weights", Limits())


def header(raw: bytes) -> object:
    """The header of a weights file whose length is right."""
    return read_header(raw, 64, "weights", Limits())


def manifest(raw: bytes) -> object:
    """A manifest."""
    return read_manifest(raw, "manifest", "k")


def recipe(raw: bytes) -> object:
    """The YAML of a run, read to the end."""
    return configfile.config_of(raw.decode("utf-8", "replace"), "run")


MODULES = (strict, manifests, headers, numbers, fields, configfile, yamltext, engine, values)
PARSERS: dict[str, Parser] = {
    "config": config, "weights": weights, "header": header, "manifest": manifest, "recipe": recipe
}  # fmt: skip


def measure(budget: Budget) -> Finding:
    """The corpus and random damage of it, through every parser; in full by coverage too, where atheris is there."""
    inputs = budget.of(FULL, QUICK)
    faults: list[str] = []
    done: dict[str, int] = {}
    with silent():
        for name, parser in PARSERS.items():
            found: Outcome = forked(
                partial(_fuzz, parser, _seeds(name), corpus(name), inputs, budget.seed, _grower(name)), 60 * MINUTES
            )
            if found.died:
                faults.append(f"{name}: {found.died.strip().splitlines()[-1]}")
            else:
                done[name] = found.value["inputs"]
                faults += [f"{name}: {fault}" for fault in found.value["faults"]]
        led = {} if budget.quick else _led(budget.seed, faults)
    figure = f"random damage: {_counts(done)}; by coverage: {_counts(led)}; {len(faults)} uncaught"
    return Finding(not faults, figure, tuple(faults))


def _counts(done: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in done.items()) or "not tried"


def _led(seed: int, faults: list[str]) -> dict[str, int]:
    """Inputs tried by coverage for each parser; none where atheris is not installed."""
    done = {}
    for name, parser in PARSERS.items():
        try:
            count, found = explore(parser, MODULES, corpus(name), FULL, LED_SECONDS, seed)
        except MissingExtra:
            return {}
        done[name] = count
        faults += [f"{name}, by coverage: {fault}" for fault in found]
    return done


def _grower(name: str) -> Grower | None:
    """What grows inputs for a parser from a grammar, where there is one."""
    if name == "recipe":
        return growing.raw_yaml
    return partial(growing.raw_config, fields=sorted(TRANSLATORS["LORA"].fields)) if name == "config" else None


def _fuzz(
    parser: Parser, seeds: list[bytes], pool: list[bytes], inputs: int, seed: int, grow: Grower | None
) -> dict[str, Any]:
    draw, faults = random.Random(seed), []
    start, tried = time.monotonic(), 0
    for turn in range(inputs):
        if turn < len(pool):
            raw = pool[turn]
        elif grow is not None and turn % 2:
            raw = grow(draw)
        else:
            raw = damaged(draw.choice(seeds if turn % RARE else pool), draw)
        fault = crash(parser, raw)
        tried += 1
        if fault:
            faults.append(f"{fault} on {raw[:80]!r}")
            if len(faults) >= 5:
                break
        if time.monotonic() - start > 60 * MINUTES - 30:
            break
    return {"inputs": tried, "faults": faults}


def crash(parser: Parser, raw: bytes) -> str | None:
    """What a parser raised that is no refusal."""
    try:
        parser(raw)
    except RankloomError:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """A few edits: bytes flipped, cut, doubled, words of the formats put in, or a value in place of another."""
    data = bytearray(raw)
    for _ in range(draw.randint(1, 5)):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at : at + draw.randint(1, 12)]
            case 2:
                data[at:at] = data[at : at + draw.randint(1, 40)] * draw.randint(1, 3)
            case 3:
                data[at:at] = draw.randbytes(draw.randint(1, 6))
            case 4 if there := list(VALUE.finditer(data)):
                found = draw.choice(there)
                data[found.start() : found.end()] = draw.choice(VALUES)
            case _:
                data[at:at] = draw.choice(WORDS)
    return bytes(data[:4096])


def corpus(name: str) -> list[bytes]:
    """Good inputs, and every input that was once a finding."""
    kept = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))] if (CORPUS / name).is_dir() else []
    return [*_seeds(name), *kept]


def _seeds(name: str) -> list[bytes]:
    files = bare(good())
    if name == "config":
        every = {key: field.default for key, field in TRANSLATORS["LORA"].fields.items()} | {"peft_type": "LORA"}
        return [files["adapter_config.json"], json.dumps(every).encode(), b'{"peft_type":"ADALORA","total_step":9}']
    if name == "header":
        return [
            b'{"a":{"dtype":"F32","shape":[2,4],"data_offsets":[0,32]},'
            b'"b":{"dtype":"BF16","shape":[16],"data_offsets":[32,64]}}'
        ]
    if name == "weights":
        return [files["adapter_model.safetensors"][:4096], (2).to_bytes(8, "little") + b"{}"]
    if name == "manifest":
        return [sealed({"a": b"1"}, {"kind": "k", "plan": {}})["manifest.json"], b'{"name":"web app"}']
    return [
        b"model: x\ndata: {source: a.jsonl, format: chat}\nplan:\n  method: {name: lora, r: 8}\ntrain: {lr: 1e-3}\n",
        b"a: &a [1, 2]\nb: *a\nc: {<<: {x: 1}, y: 'z'}\n",
        b"plan: {method: {name: dora, inner: lora}, store: {name: uniform, bits: 3}, rules: [lora_plus]}\nseed: 1\n",
    ]


ROW = Row(
    2,
    "no parser has an uncaught exception",
    measure,
    (
        Sabotage("JSON errors are not caught", lambda: swapped(json, "JSONDecodeError", KeyError)),
        Sabotage("sizes of a tensor are not checked", lambda: swapped(headers, "_sizes", lambda value: True)),
    ),
)
