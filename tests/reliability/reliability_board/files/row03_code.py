"""Row 3: nothing in a file runs code."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import rankloom as rl
from rankloom import registry
from rankloom.errors import RankloomError
from rankloom.files import folders
from rankloom.files.manifest import sealed
from rankloom.formats import manifest as gate
from rankloom.formats.manifest import CONFIG, KIND, WEIGHTS
from rankloom.jobs.opening import open_path
from rankloom.jobs.runs import CONFIG as CONFIG_OF_RUN
from rankloom.train import configfile
from rankloom.train.checkpoint import load_checkpoint, save_checkpoint
from rankloom.train.configfile import read_config
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.child import forked
from reliability_board.files.world import Files, bare, base, config_of, folder, good, silent, with_config, write

PLANTED = ("evil_module", "megatron")
"""Names of modules that lie on the import path, ready to be imported."""


class Bomb:
    """Unpickling it writes a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


Payload = Callable[[Path, Path], None]
"""(folder to work in, marker) → nothing: writes a hostile file and opens it by the library's own call."""


def measure(budget: Budget) -> Finding:
    """Every payload in a child that has the planted modules on its path; then markers and modules are looked for."""
    faults = []
    payloads = _payloads()
    with silent():
        for name, payload in list(payloads.items())[:: budget.of(1, 2)]:
            with folder() as root:
                marker = root / "marker"
                for module in PLANTED:
                    (root / f"{module}.py").write_text(f"open({str(root / 'imported')!r}, 'w')\nclass Model: pass\n")
                found = forked(functools.partial(_try, payload, root, marker), 20.0)
                faults += [f"{name}: {fault}" for fault in _faults(root, marker, found.value, found.died)]
    tried = len(payloads) if not budget.quick else (len(payloads) + 1) // 2
    return Finding(not faults, f"{tried} payloads; {len(faults)} that ran or imported something", tuple(faults))


def _try(payload: Payload, root: Path, marker: Path) -> list[str]:
    sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = str(root)
    work = root / "work"
    work.mkdir()
    with contextlib.suppress(RankloomError):
        payload(work, marker)
    return [name for name in PLANTED if name in sys.modules]


def _faults(root: Path, marker: Path, imported: Any, died: str | None) -> list[str]:
    found = [f"imported {name}" for name in imported or ()]
    found += ["a marker was written"] if marker.exists() else []
    found += ["a planted module ran"] if (root / "imported").exists() else []
    return [*found, *([died.strip().splitlines()[-1]] if died else [])]


def _payloads() -> dict[str, Payload]:
    files = good()
    found: dict[str, Payload] = {}
    forms: dict[str, Callable[[Path], bytes]] = {
        "pickle": lambda marker: pickle.dumps(Bomb(marker)),
        "old pickle": lambda marker: pickle.dumps(Bomb(marker), protocol=0),
        "torch.save": _torch_bytes,
    }
    for form, made in forms.items():
        for name in (WEIGHTS, CONFIG, "manifest.json", "adapter_model.bin", "optimizer.pt"):
            found[f"{form} as {name}"] = functools.partial(_file, files, name, made)
        for name in ("weights.safetensors", "state.safetensors", "state.json"):
            found[f"{form} as a checkpoint's {name}"] = functools.partial(_checkpoint, name, made)
    for field, value in {
        "auto_mapping": {"base_model_class": "Model", "parent_library": "evil_module"},
        "megatron_core": "megatron.core",
        "megatron_config": {"a": 1},
        "peft_type": "evil_module.Model",
        "task_type": "evil_module.Model",
        "trust_remote_code": True,
        "auto_map": {"AutoModel": "evil_module.Model"},
        "chat_template": "{{ cycler.__init__.__globals__.os.system('x') }}",
        "init_lora_weights": "evil_module:Model",
        "base_model_name_or_path": "evil_module",
    }.items():
        found[f"{field} in a PEFT config"] = functools.partial(_config, files, field, value)
    for name in ("evil_module:Model", "evil_module.Model", "megatron.core:Model", "os:system", "rankloom.cli:main"):
        found[f"method {name} in a native plan"] = functools.partial(_native, name)
        found[f"rule {name} in a manifest"] = functools.partial(_rule, files, name)
    for name in ("run.yaml", "config.yaml"):
        found[f"trust_remote_code in {name}"] = functools.partial(_trusting, name)
    for tag in (
        "!!python/object/apply:os.system ['touch @']",
        "!!python/module:evil_module",
        "!!python/name:evil_module.Model",
    ):
        found[f"YAML {tag.split()[0]}"] = functools.partial(_yaml, tag)
    return found


def _torch_bytes(marker: Path) -> bytes:
    from io import BytesIO

    out = BytesIO()
    torch.save({"x": Bomb(marker)}, out)
    return out.getvalue()


def _file(files: Files, name: str, made: Callable[[Path], bytes], work: Path, marker: Path) -> None:
    there = {**files, name: made(marker)}
    if name.endswith(".bin"):
        del there[WEIGHTS]
    rl.load(base(), write(there, work / "a"))


def _checkpoint(name: str, made: Callable[[Path], bytes], work: Path, marker: Path) -> None:
    place = save_checkpoint(work, 1, {"w": torch.ones(2)}, {"n": 1})
    files = {p.name: p.read_bytes() for p in place.iterdir() if p.name != "manifest.json"}
    folders.write_folder(
        place, sealed({**files, name: made(marker)}, {"kind": "rankloom-checkpoint", "step": 1, "parent": None})
    )
    load_checkpoint(place)


def _config(files: Files, field: str, value: Any, work: Path, marker: Path) -> None:
    rl.load(base(), write(with_config(bare(files), **{field: value}), work / "a"), ignore=[field])


def _native(name: str, work: Path, marker: Path) -> None:
    model = base()
    rl.attach(model, rl.hydralora(r=2), target_modules=["q_proj"])
    rl.save(model, work / "n")
    files = bare({p.name: p.read_bytes() for p in (work / "n").iterdir()})
    plan = {**config_of(files)["plan"], "method": {"name": name}}
    rl.load(base(), write(with_config(files, plan=plan), work / "a"))


def _rule(files: Files, name: str, work: Path, marker: Path) -> None:
    said = json.loads(files["manifest.json"])
    about = {k: said[k] for k in ("versions", "base")} | {
        "kind": KIND,
        "plan": {**said["plan"], "rules": [{"name": name}]},
    }
    rl.load(base(), write(sealed(bare(files), about), work / "a"))


def _yaml(tag: str, work: Path, marker: Path) -> None:
    path = work / "run.yaml"
    path.write_text(f"model: {tag.replace('@', str(marker))}\n")
    read_config(path, [])


def _trusting(name: str, work: Path, marker: Path) -> None:
    """A file that turns on the code of its model: the marker stands for that code."""
    (work / name).write_text("model: {path: base, trust_remote_code: true}\n")
    opened = open_path(work if name == CONFIG_OF_RUN else work / name)
    if opened.config.need_model().trust_remote_code:
        marker.touch()


@contextlib.contextmanager
def _unpickling() -> Iterator[None]:
    """Weights that are no safetensors are tried as a pickle: the classic fall-back."""
    strict = gate._weights

    def lenient(file: Any, limits: Any) -> Any:
        try:
            return strict(file, limits)
        except RankloomError:
            pickle.loads(file.path.read_bytes())
            raise

    with swapped(gate, "_weights", lenient):
        yield


def _importing(base_class: type, name: str) -> Any:
    try:
        return _class_of(base_class, name)
    except RankloomError:
        return registry.load(name)


_class_of = registry.class_of


ROW = Row(
    3,
    "nothing in a file runs code",
    measure,
    (
        Sabotage("weights fall back to a pickle", _unpickling),
        Sabotage(
            "a file may say whose code is trusted", lambda: swapped(configfile, "_without_code", lambda d: (d, False))
        ),
        Sabotage("names of methods and rules are imported", lambda: swapped(registry, "class_of", _importing)),
    ),
)
