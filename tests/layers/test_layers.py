"""The import law holds, the checker sees what breaks it, and importing the library stays light."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from import_law import ROOMS, circles, violations

import rankloom

SOURCE = Path(rankloom.__file__).parent


def test_the_law_holds() -> None:
    assert violations(SOURCE) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(SOURCE) == []


def test_a_circle_is_seen_also_one_for_types_only(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "a.py").write_text("from rankloom.core.b import x")
    (tmp_path / "core" / "b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rankloom.core.a import y"
    )
    assert len(found := circles(tmp_path)) == 1
    assert "core/a.py" in found[0]


def test_the_law_of_every_room_names_rooms() -> None:
    assert set().union(*ROOMS.values()) <= ROOMS.keys()
    for room in ROOMS:
        assert not ROOMS[room] & {"cli"}, "nobody imports cli"
        assert "recipes" not in ROOMS[room] or room == "cli", "nobody but cli imports recipes"


PLANTED = {
    ("core/bad.py", "from rankloom.methods.lora import LoRA"): "core may not import methods",
    (
        "core/bad.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rankloom.train import fit",
    ): "core may not import train",
    ("jobs/bad.py", "import rankloom.cli"): "jobs may not import cli",
    ("core/bad.py", "def f():\n    from rankloom.train import fit"): "core may not import train",
    ("ops/bad.py", "import rankloom.store.base"): "ops may not import store",
    ("store/bad.py", "from ..core import kinds"): "store may not import core",
    ("methods/bad.py", "from rankloom import registry"): "methods may not import registry",
    ("methods/bad.py", "from rankloom import LoRA"): "methods may not import public",
    ("rules/bad.py", "import transformers"): "transformers may be imported only in hf, jobs, recipes",
    ("train/bad.py", "try:\n    import peft.tuners\nexcept ImportError:\n    pass"): "peft may be imported only in",
    ("hf/bad.py", "from accelerate import Accelerator"): "accelerate may be imported only in train/",
    ("train/bad.py", "from datasets import Dataset"): "datasets may be imported only in",
    ("formats/bad.py", "from rankloom.hf.models import x"): "formats may not import hf",
    ("hf/bad.py", "from rankloom.recipes import language"): "hf may not import recipes",
    ("testing/bad.py", "import rankloom.cli"): "testing may not import cli",
    ("microworld/bad.py", "from rankloom.train.data import load"): "microworld may not import train",
    ("errors.py", "from rankloom.core import bank"): "errors may not import core",
    ("lounge/bad.py", ""): "lounge/: no room of the architecture",
}


@pytest.mark.parametrize(("file", "text"), PLANTED)
def test_a_planted_violation_is_seen(file: str, text: str, tmp_path: Path) -> None:
    for room in ROOMS:
        path = tmp_path / (f"{room}/__init__.py" if room != "public" else "__init__.py")
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert violations(tmp_path) == []
    bad = tmp_path / file
    bad.parent.mkdir(exist_ok=True)
    bad.write_text(text)
    assert len(found := violations(tmp_path)) == 1
    assert PLANTED[file, text] in found[0]


LAWFUL = {
    ("core/good.py", "from rankloom.errors import StateError\nfrom rankloom.ops import linalg"),
    ("methods/good.py", "from . import lora\nfrom rankloom.gates import topk"),
    ("hf/good.py", "import transformers, peft\nfrom rankloom.train.fit import fit"),
    ("train/good.py", "def f():\n    from accelerate import Accelerator"),
    ("cli/good.py", "import rankloom\nfrom rankloom.recipes import language"),
}


@pytest.mark.parametrize(("file", "text"), sorted(LAWFUL))
def test_what_is_lawful_is_let_be(file: str, text: str, tmp_path: Path) -> None:
    for room in ROOMS:
        path = tmp_path / (f"{room}/__init__.py" if room != "public" else "__init__.py")
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / file).write_text(text)
    assert violations(tmp_path) == []


HEAVY = (
    "transformers", "accelerate", "datasets", "peft", "trl", "diffusers", "yaml", "rich", "typer", "click",
    "huggingface_hub", "safetensors", "tokenizers", "pyarrow", "pandas", "scipy", "sklearn", "matplotlib",
)  # fmt: skip


def _loaded(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after the statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=500)
    return set(done.stdout.split())


def test_importing_rankloom_brings_torch_and_nothing_else_of_weight() -> None:
    with_torch = _loaded("import torch")
    with_rankloom = _loaded("import rankloom; rankloom.LoRA(r=4), rankloom.attach, rankloom.DoRA, rankloom.Plan")
    assert not (with_rankloom - with_torch) & set(HEAVY)
    assert not with_torch & set(HEAVY)
    ours = {name for name in with_rankloom - with_torch if not name.startswith("_")}
    assert ours - set(sys.stdlib_module_names) <= {"rankloom"}


def test_a_bare_import_does_not_even_load_torch() -> None:
    assert "torch" not in _loaded("import rankloom")


def _cpu_seconds(*command: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True, timeout=500, env={**os.environ, "COLUMNS": "80"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def test_help_takes_less_than_half_a_second() -> None:
    """On a slow machine, hardly more than the help of a typer program that does nothing."""
    bare = "import typer\napp = typer.Typer()\n@app.command()\ndef nothing() -> None: ...\napp(['--help'])"
    ours = min(_cpu_seconds(sys.executable, "-m", "rankloom.cli", "--help") for _ in range(3))
    typer = min(_cpu_seconds(sys.executable, "-c", bare) for _ in range(3))
    assert ours < max(0.5, 1.5 * typer), f"rankloom --help takes {ours:.2f} s of CPU time, typer's own {typer:.2f} s"


def test_help_does_not_load_torch() -> None:
    code = (
        "import runpy, sys\nsys.argv = ['rankloom', '--help']\n"
        "try:\n    runpy.run_module('rankloom.cli', run_name='__main__')\nexcept SystemExit as stop:\n"
        "    assert not stop.code, stop.code\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=500)
    assert done.stdout.splitlines()[-1] == "False"
    assert "Usage" in done.stdout
