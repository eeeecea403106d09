"""Broken adapter folders, made by code from one good one: what row 1 tries."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankloom.files.manifest import MANIFEST
from rankloom.formats.manifest import CARD, CONFIG, WEIGHTS
from rankloom.formats.peft.fields import DESCRIPTIVE, NEUTRAL
from rankloom.formats.peft.lora import Lora
from reliability_board.files.world import (
    Files,
    bare,
    config_of,
    joined,
    split,
    tensors_of,
    with_config,
    with_tensors,
)


@dataclass(frozen=True)
class Case:
    """One folder. `names`: what a refusal must name, the file among it; `harmless`: it must load and change nothing.

    `after`: done to the written folder (links, pipes).
    """

    name: str
    files: Files
    names: tuple[str, ...]
    harmless: bool = False
    after: Callable[[Path], None] | None = None


def curated(good: Files) -> list[Case]:
    """Every case; `good` is with a manifest."""
    plain = bare(good)
    return [
        *_wrong_types(plain), *_literals(plain), *_doubled(plain), *_texts(plain), *_unknown(plain), *_types(plain),
        *_targets(plain), *_patterns(plain), *_refused_features(plain), *_tensors(plain), *_relabelled(plain),
        *_headers(plain), *_cut(plain), *_strangers(plain), *_kinds(plain), *_flipped(good), *_meanings(good),
        *_harmless(plain),
    ]  # fmt: skip


WRONG = {
    "text": "zz", "list": [[1]], "object": {"a": {"b": 1}}, "negative": -1, "fraction": 1.5, "true": True,
    "large": 10**12,
}  # fmt: skip
VALID = {
    ("bias", "text"), ("fan_in_fan_out", "true"), ("lora_bias", "true"), ("use_dora", "true"),
    ("inference_mode", "true"), ("init_lora_weights", "true"),
    ("lora_alpha", "fraction"), ("lora_alpha", "negative"), ("unsloth_fixed", "true"), ("use_rslora", "true"),
    ("qalora_group_size", "negative"), ("qalora_group_size", "large"), ("exclude_modules", "text"),
    ("layers_pattern", "text"),
}  # fmt: skip
"""Pairs that are no fault of type: other families have them."""


def _wrong_types(plain: Files) -> Iterator[Case]:
    for field in sorted({**DESCRIPTIVE, **Lora.fields}):
        for kind, value in WRONG.items():
            text = (field in DESCRIPTIVE and kind == "text") or (field, kind) in VALID
            if not text and not (isinstance(value, dict) and DESCRIPTIVE.get(field, None) is DESCRIPTIVE["eva_config"]):
                yield Case(f"{field} is {kind}", with_config(plain, **{field: value}), (CONFIG, field))


def _literals(plain: Files) -> Iterator[Case]:
    for field in ("r", "lora_alpha", "lora_dropout", "layers_to_transform", "rank_pattern", "qalora_group_size"):
        for literal in ("NaN", "Infinity", "-Infinity", "1e999"):
            text = json.dumps({**config_of(plain), field: "@"}).replace('"@"', literal)
            yield Case(f"{field} is {literal}", {**plain, CONFIG: text.encode()}, (CONFIG, literal))


def _doubled(plain: Files) -> Iterator[Case]:
    for field in sorted({**DESCRIPTIVE, **Lora.fields}):
        value = json.dumps(config_of(plain).get(field))
        text = json.dumps({field: config_of(plain).get(field), **config_of(plain)})[:-1] + f', "{field}": {value}}}'
        yield Case(f"{field} twice", {**plain, CONFIG: text.encode()}, (CONFIG, field))


def _texts(plain: Files) -> Iterator[Case]:
    raw = plain[CONFIG]
    others = {
        "empty": b"", "null": b"null", "a list": b"[]", "a number": b"7", "a text": b'"x"',
        "UTF-16": raw.decode().encode("utf-16"),
        "a mark first": b"\xef\xbb\xbf" + raw, "bad UTF-8": raw[:-2] + b"\xff}", "deep": b'{"a":' * 100_000,
        "deep lists": b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}", "two objects": raw + raw,
        "a comment": raw + b"// x",
        "single quotes": raw.replace(b'"', b"'"), "a comma last": raw.rstrip()[:-1] + b",}", "zeros": bytes(100),
        "a long number": raw.rstrip()[:-1] + b',"r":' + b"9" * 6000 + b"}", "too large": raw + b" " * (1 << 20),
        "a pickle": b"\x80\x04K\x01.",
    }  # fmt: skip
    for name, data in others.items():
        yield Case(f"config is {name}", {**plain, CONFIG: data}, (CONFIG,))
    whole = len(raw.rstrip())
    for at in range(1, 25):
        yield Case(f"config cut at {at}/25", {**plain, CONFIG: raw[: whole * at // 25]}, (CONFIG,))


def _unknown(plain: Files) -> Iterator[Case]:
    unknown = {
        "use_mora": True, "scale": 3.0, "lora_alhpa": 32, "alpha": 32, "target_module": ["k_proj"], "code": "import os",
        "auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True, "kernel": "x", "R": 4, "model_file": "m.py",
    }  # fmt: skip
    for field, value in unknown.items():
        yield Case(f"unknown field {field}", with_config(plain, **{field: value}), (CONFIG, field))


def _types(plain: Files) -> Iterator[Case]:
    types = [
        "LOHA",
        "LOKR",
        "IA3",
        "OFT",
        "BOFT",
        "lora",
        "LoRA",
        "PROMPT_TUNING",
        "P_TUNING",
        "XLORA",
        "HRA",
        "RANDLORA",
    ]
    for value in [*types, "", " LORA", "LORA\n", "os.system", 3, None, ["LORA"], {"LORA": 1}, True]:
        yield Case(f"peft_type {value!r}", with_config(plain, peft_type=value), (CONFIG, "peft_type"))
    yield Case("peft_type absent", with_config(plain, peft_type=...), (CONFIG, "peft_type"))
    for value in ("VERA", "ADALORA"):
        yield Case(f"peft_type {value}", with_config(plain, peft_type=value), ())
    yield Case("peft_type RANKLOOM", with_config(plain, peft_type="RANKLOOM"), (CONFIG,))


def _targets(plain: Files) -> Iterator[Case]:
    changes: list[dict[str, Any]] = [
        {"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"]},
        {"target_modules": ["q_proj", "v_proj", "k_proj"]},
        {"target_modules": ["q_proj", "v_proj", "lm_head"]}, {"target_modules": []}, {"target_modules": ["zz"]},
        {"target_modules": "q_proj"}, {"target_modules": ".*q_proj"}, {"target_modules": ".*layers.0.*(q|v)_proj"},
        {"target_modules": ["layers.0.self_attn.q_proj", "v_proj"]}, {"layers_to_transform": 0},
        {"layers_to_transform": [1]},
        {"layers_to_transform": [7]}, {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]}, {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [1, 2]}, {"use_dora": True},
        {"lora_bias": True}, {"target_parameters": ["q_proj.weight"]}, {"layer_replication": [[0, 2], [1, 2]]},
        {"trainable_token_indices": {"embed_tokens": [10**9]}}, {"r": 4}, {"r": 16}, {"r": 0}, {"r": -8}, {"r": 4097},
        {"r": 10**9},
    ]  # fmt: skip
    for change in changes:
        yield Case(f"config says {change}", with_config(plain, **change), ("adapter_",))
    bomb = r"((((([\w.])+)+)+)+)+!"
    yield Case("a regular expression that never ends", with_config(plain, target_modules=bomb), (), harmless=True)


def _patterns(plain: Files) -> Iterator[Case]:
    for field in ("rank_pattern", "alpha_pattern"):
        for value in (
            {"q_proj": 0}, {"q_proj": -1}, {"q_proj": 10**7}, {"q_proj": "8"}, {"q_proj": [8]}, {"q_proj": None},
            {"(a+)+$": 8}, {"((((.)*)*)*)*x": 8}, [["q_proj", 8]], "q_proj", {"q_proj": True}, {"q_proj": {"r": 8}},
        ):  # fmt: skip
            if not (field == "alpha_pattern" and value in ({"q_proj": 0}, {"q_proj": -1})):
                yield Case(f"{field} {value}", with_config(plain, **{field: value}), (CONFIG,))
    yield Case("a rank of another size", with_config(plain, rank_pattern={"q_proj": 4}), (WEIGHTS, "q_proj"))
    yield Case("bad expression", with_config(plain, rank_pattern={"(((": 4}), (CONFIG,))


def _refused_features(plain: Files) -> Iterator[Case]:
    for field in NEUTRAL:
        for value in (True, {"a": 1}, "evil.module", [1], 3):
            yield Case(f"{field}={value!r}", with_config(plain, **{field: value}), (CONFIG, field))
    for start in ("olora", "corda", "lora_ga", "loftq", "zz", "pissa_niter_4"):
        yield Case(f"init {start}", with_config(plain, init_lora_weights=start), (CONFIG, "init_lora_weights"))


def _tensors(plain: Files) -> Iterator[Case]:
    changes: dict[str, Callable[[torch.Tensor], Any]] = {
        "missing": lambda t: ...,
        "transposed": lambda t: t.T.clone(),
        "a row short": lambda t: t[1:],
        "a row long": lambda t: torch.cat([t, t[:1]]),
        "flat": lambda t: t.flatten(),
        "a dimension more": lambda t: t[None],
        "empty": lambda t: t[:0],
        "one number": lambda t: t[:1, :1],
        "one NaN": lambda t: _at(t, float("nan")),
        "one Inf": lambda t: _at(t, float("inf")),
        "one 1e30": lambda t: _at(t, 1e30),
        "all NaN": lambda t: t * float("nan"),
        "int64": lambda t: (t * 10).long(),
        "int32": lambda t: (t * 10).int(),
        "uint8": lambda t: (t * 10).byte(),
        "int8": lambda t: (t * 10).char(),
        "bool": lambda t: t > 0,
        "complex": lambda t: t.to(torch.complex64),
    }
    for key, tensor in tensors_of(plain).items():
        for name, change in changes.items():
            yield Case(f"{key} {name}", with_tensors(plain, **{key: change(tensor)}), (WEIGHTS, key))


def _at(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[-1, -1] = value
    return changed


def _relabelled(plain: Files) -> Iterator[Case]:
    header, body = split(plain)
    for key in header:
        for dtype in ("I32", "U32", "F99", "f32", None, ["F32"]):
            changed = {**header, key: {**header[key], "dtype": dtype}}
            yield Case(f"{key} labelled {dtype}", {**plain, WEIGHTS: joined(changed, body)}, (WEIGHTS, key))


def _headers(plain: Files) -> Iterator[Case]:
    header, body = split(plain)
    key = min(header)
    entry = header[key]
    entries: list[Any] = [
        {**entry, "extra": 1}, {k: v for k, v in entry.items() if k != "shape"}, {**entry, "shape": [8, -32]},
        {**entry, "shape": [8.0, 32]}, {**entry, "shape": "8x32"}, {**entry, "shape": [1 << 60, 1 << 60]},
        {**entry, "shape": [2] * 70}, {**entry, "data_offsets": [0]}, {**entry, "data_offsets": [4, 0]},
        {**entry, "data_offsets": [-8, 0]}, {**entry, "data_offsets": [0, 1 << 62]}, {**entry, "data_offsets": None},
        {**entry, "shape": [True, 32]}, None, [], "x", 7,
    ]  # fmt: skip
    for i, changed in enumerate(entries):
        yield Case(f"entry {i}", {**plain, WEIGHTS: joined({**header, key: changed}, body)}, (WEIGHTS, key))
    raw = json.dumps(header).encode()
    headers: dict[str, Any] = {
        "blanks first": b"  " + raw, "a list": b"[]", "no JSON": b"{", "empty": b"", "zeros": bytes(64),
        "no tensors": {},
        "twice": raw[:-1] + b"," + raw[1:], "metadata no object": {**header, "__metadata__": 3},
        "metadata no texts": {**header, "__metadata__": {"a": {"b": 1}}}, "NaN": raw[:-1] + b',"x":NaN}',
        "large metadata": {**header, "__metadata__": {"a": "x" * (70 << 10)}}, "deep": b'{"a":' * 50_000,
        "bad UTF-8": raw[:-1] + b'"\xff"}',
        "all at one place": {k: {**v, "data_offsets": entry["data_offsets"]} for k, v in header.items()},
    }  # fmt: skip
    for name, changed in headers.items():
        yield Case(f"header: {name}", {**plain, WEIGHTS: joined(changed, body)}, (WEIGHTS,))
    for length in (
        0,
        1,
        7,
        len(raw) - 1,
        len(raw) + 1,
        1 << 23,
        (1 << 23) + 1,
        99 << 20,
        1 << 31,
        1 << 63,
        (1 << 64) - 1,
    ):
        data = length.to_bytes(8, "little") + raw + body
        yield Case(f"header length {length}", {**plain, WEIGHTS: data}, (WEIGHTS,))


def _cut(plain: Files) -> Iterator[Case]:
    raw = plain[WEIGHTS]
    for at in range(30):
        yield Case(f"weights cut at {at}/30", {**plain, WEIGHTS: raw[: len(raw) * at // 30]}, (WEIGHTS,))
    for more in (b"\0", b"PK\x03\x04", raw, bytes(4096)):
        yield Case(f"{len(more)} bytes behind the weights", {**plain, WEIGHTS: raw + more}, (WEIGHTS,))


def _strangers(plain: Files) -> Iterator[Case]:
    one = torch.full((32, 32), 0.5)
    names = {
        "model.layers.0.self_attn.q_proj.weight": one, "model.layers.1.self_attn.v_proj.base_layer.weight": one,
        "base_model.model.model.layers.0.self_attn.k_proj.weight": one,
        "base_model.model.lm_head.weight": torch.ones(64, 32),
        "base_model.model.model.embed_tokens.weight": torch.ones(64, 32), "model.norm.weight": torch.zeros(32),
        "base_model.model.model.norm.weight": torch.zeros(32),
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": one,
        "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight": torch.ones(8, 32),
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": torch.ones(8, 32),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight": torch.ones(8, 32),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(32),
        "__class__": torch.ones(1), "rankloom": torch.ones(1), "": torch.ones(1), "../../x": torch.ones(1),
        "a\nb": torch.ones(1),
    }  # fmt: skip
    for name, tensor in names.items():
        yield Case(f"a tensor {name!r} more", with_tensors(plain, **{name: tensor}), (WEIGHTS,))
    for key in tensors_of(plain):
        for other in (key.replace("layers.0", "layers.5"), key.upper(), f"{key}.x", key.replace("lora_", "loha_")):
            if other != key:
                changed = with_tensors(plain, **{key: ..., other: tensors_of(plain)[key]})
                yield Case(f"{key} called {other}", changed, (WEIGHTS,))


def _kinds(plain: Files) -> Iterator[Case]:
    for name in (CONFIG, WEIGHTS):
        acts: dict[str, Callable[[Path], None]] = {
            "absent": lambda path: None,
            "a directory": lambda path: path.mkdir(),
            "a pipe": lambda path: os.mkfifo(path),
            "a link to nothing": lambda path: path.symlink_to("nothing"),
            "a link to itself": lambda path: path.symlink_to(path.name),
            "a link to a device": lambda path: path.symlink_to("/dev/zero"),
            "a link to /etc/passwd": lambda path: path.symlink_to("/etc/passwd"),
            "a link to the process": lambda path: path.symlink_to("/proc/self/environ"),
            "a link upwards": lambda path: path.symlink_to("../"),
        }
        for kind, act in acts.items():
            yield Case(f"{name} is {kind}", plain, (name,), after=lambda f, n=name, a=act: _instead(f / n, a))  # type: ignore[misc]
        yield Case(f"{name} empty", {**plain, name: b""}, (name,))


def _instead(path: Path, act: Callable[[Path], None]) -> None:
    path.unlink()
    act(path)


def _flipped(good: Files) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(3)
    for name in (CONFIG, WEIGHTS, MANIFEST):
        for bit in torch.randint(0, 8 * len(good[name]), (40,), generator=generator).tolist():
            data = bytearray(good[name])
            data[bit // 8] ^= 1 << bit % 8
            yield Case(f"bit {bit} of {name} flipped", {**good, name: bytes(data)}, (name,))


def _meanings(good: Files) -> Iterator[Case]:
    """Valid content with another meaning: only the manifest can tell."""
    for change in ({"lora_alpha": 8}, {"lora_alpha": -16}, {"use_rslora": True}, {"lora_dropout": 0.5}):
        yield Case(f"another {change}", with_config(good, **change), (CONFIG,))
    tensors = tensors_of(good)
    for key, tensor in tensors.items():
        twin = next(k for k, t in tensors.items() if k != key and t.shape == tensor.shape)
        swapped = with_tensors(good, **{key: tensors[twin], twin: tensor})
        yield Case(f"{key} and {twin} swapped", swapped, (WEIGHTS,))
        yield Case(f"{key} negated", with_tensors(good, **{key: -tensor}), (WEIGHTS,))


def _harmless(plain: Files) -> Iterator[Case]:
    header, body = split(plain)
    folders = {
        "a card": {**plain, CARD: b"# x"}, "an optimizer beside": {**plain, "optimizer.pt": b"\x80\x04whatever"},
        "arguments beside": {**plain, "training_args.bin": b"\x80\x04K\x01."}, "no indent": with_config(plain),
        "peft_version": with_config(plain, peft_version="0.17.0"),
        "task_type": with_config(plain, task_type="CAUSAL_LM"),
        "metadata": {**plain, WEIGHTS: joined({"__metadata__": {"format": "pt"}, **header}, body)},
        "fields switched off": with_config(plain, bias="none", use_dora=False, corda_config=None),
        "another manifest.json": {**plain, MANIFEST: b'{"name": "web app"}'},
        "inference_mode": with_config(plain, inference_mode=True),
        "nothing excluded": with_config(plain, exclude_modules="zz"),
        "the name of no blocks": with_config(plain, layers_pattern="zz"),
        "biases of a model without": with_config(plain, bias="all"),
    }  # fmt: skip
    for name, files in folders.items():
        yield Case(f"harmless: {name}", files, (), harmless=True)
