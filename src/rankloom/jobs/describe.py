"""What a folder or a model holds: an adapter, a run, or a model's layers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankloom import formats
from rankloom.core.kinds import kind_of
from rankloom.core.targets import base_modules
from rankloom.errors import FileError
from rankloom.files.reading import plain_file
from rankloom.files.strict import parse
from rankloom.hf.models import architectures, skeleton
from rankloom.jobs.opening import ADAPTER_CONFIG
from rankloom.jobs.runs import ADAPTER, RECORD, plain
from rankloom.train.config import ModelSettings
from rankloom.train.configfile import read_config

LARGEST, DEEPEST = 64 << 20, 50
"""Bytes of a run's record that are read, and its levels."""


@dataclass(frozen=True)
class Table:
    """Columns and rows of text and numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Description:
    """`data` for machines; `facts` (name, value) and `tables` for people."""

    data: dict[str, Any]
    facts: tuple[tuple[str, Any], ...]
    tables: tuple[Table, ...] = field(default=())


def describe(path: str, changes: Sequence[str] = ()) -> Description:
    """What `path` is and holds; `changes` (`key=value`) say how a model is loaded. Raises `FileError` for a path to
    nothing that is known.
    """
    folder = Path(path).expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        return _adapter(folder)
    if (folder / RECORD).is_file():
        return _run(folder)
    return _model(read_config(None, [f"model={json.dumps(path)}", *changes]).need_model())


def _adapter(folder: Path) -> Description:
    info = formats.inspect(folder)
    plan = info.plan or {}
    facts = (
        ("adapter", folder),
        ("format", f"{info.format} ({info.peft_type})"),
        ("base model", info.base),
        ("tensors", f"{info.tensors}, {info.parameters:,} numbers, {info.bytes:,} bytes"),
        ("dtypes", ", ".join(f"{n} {name}" for name, n in info.dtypes.items())),
        ("files", "as they were saved" if info.verified else "no manifest to check them against"),
        ("plan", json.dumps(plan) if plan else None),
    )
    rows = tuple((key, json.dumps(value)) for key, value in sorted(info.config.items()) if key != "plan")
    return Description({"kind": "adapter", **plain(info)}, facts, (Table(ADAPTER_CONFIG, ("field", "value"), rows),))


def _run(folder: Path) -> Description:
    try:
        record = parse(plain_file(folder / RECORD, LARGEST), str(folder / RECORD), DEEPEST)
        before, after, config = dict(record["before"]), dict(record["after"]), dict(record["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(f"{folder / RECORD}: not a run's record: {error}") from error
    facts = (
        ("run", folder),
        ("model", _of(config.get("model"), "path")),
        ("data", _of(config.get("data"), "source")),
        ("plan", json.dumps(config.get("plan"))),
        ("steps", f"{record.get('steps')} ({record.get('stopped')}) in {record.get('seconds')} s"),
        ("loads in", record.get("compatibility")),
    )
    metrics = Table("", ("metric", "before", "after"), tuple((k, before.get(k), v) for k, v in after.items()))
    inner = _adapter(folder / ADAPTER).data if (folder / ADAPTER / ADAPTER_CONFIG).is_file() else None
    return Description({"kind": "run", **record, "adapter_info": inner}, facts, (metrics,))


def _of(part: Any, key: str) -> Any:
    return part.get(key) if isinstance(part, dict) else part


def _model(settings: ModelSettings) -> Description:
    """Every layer and parameter that could be adapted, blocks put together."""
    causal = any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in architectures(settings))
    loaded = skeleton(replace(settings, task="causal-lm" if causal else "encoder"))
    model = loaded.model
    groups: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for name, module in base_modules(model):
        kind = kind_of(module)
        if kind is not None:
            shape = tuple(kind.shape(module))
            key = (_pattern(name), kind.name, shape)
            groups[key] = groups.get(key, 0) + 1
        for parameter, value in module._parameters.items():
            if value is not None and kind is None and value.ndim > 1:
                key = (_pattern(f"{name}.{parameter}"), "parameter", tuple(value.shape))
                groups[key] = groups.get(key, 0) + 1
    layers = [{"name": n, "kind": k, "shape": list(s), "count": c} for (n, k, s), c in groups.items()]
    total = sum(p.numel() for p in model.parameters())
    data = {
        "kind": "model",
        "model": loaded.source,
        "class": type(model).__name__,
        "parameters": total,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": layers,
    }
    rows = tuple((c, n, k, "×".join(map(str, s))) for (n, k, s), c in groups.items())
    facts = (("model", loaded.source), ("class", type(model).__name__), ("parameters", total), ("dtype", data["dtype"]))
    return Description(data, facts, (Table("layers that can be adapted", ("count", "name", "kind", "shape"), rows),))


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
