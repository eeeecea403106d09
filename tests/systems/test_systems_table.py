"""The table of systems tells the truth: all of the survey, and nothing "works" without a test that says so."""

import ast
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import rankloom
from rankloom.registry import COMPOSERS, METHODS, RULES, load
from rankloom.systems import System, found_facts, list_methods, list_systems, method

ROOT = Path(__file__).parents[2]
CATALOG = [line.split() for line in (Path(__file__).parent / "catalog.txt").read_text().splitlines()]
WORKS = [s for s in list_systems() if s.status == "works"]


def test_rows_are_the_catalogs():
    assert len(CATALOG) == 191
    assert [[s.id, s.section] for s in list_systems()] == CATALOG
    assert len({s.id for s in list_systems()}) == 191
    assert all(s.name.strip() for s in list_systems())


def test_status_follows_from_the_proof():
    assert System("x", "X", "1").status == "planned"
    assert System("x", "X", "1", proof="tests/x.py::test_x").status == "works"
    assert System("x", "X", "1").row() == {"id": "x", "name": "X", "section": "1", "status": "planned", "proof": None}


def defines(proof: str) -> bool:
    """Whether the file of a pytest id exists and defines its test, read without importing it."""
    path, *names = proof.split("::")
    if not names or not (ROOT / path).is_file() or not Path(path).name.startswith("test_"):
        return False
    body = ast.parse((ROOT / path).read_text()).body
    for name in names[:-1]:
        body = next((n.body for n in body if isinstance(n, ast.ClassDef) and n.name == name), [])
    leaf = names[-1].partition("[")[0]
    return leaf.startswith("test_") and any(isinstance(n, ast.FunctionDef) and n.name == leaf for n in body)


def test_a_proof_that_does_not_exist_is_found_out():
    here = "tests/systems/test_systems_table.py"
    assert defines(f"{here}::test_rows_are_the_catalogs")
    assert not defines(f"{here}::test_that_nobody_wrote")
    assert not defines(f"{here}::defines")
    assert not defines(here)
    assert not defines("tests/systems/test_nowhere.py::test_rows_are_the_catalogs")


@pytest.mark.parametrize("system", WORKS, ids=lambda s: s.id)
def test_a_working_system_has_its_proof_and_runs(system):
    assert defines(system.proof), system.proof
    assert system.runs
    assert system.parts


def test_names_and_parts_resolve():
    for system in list_systems():
        for name in system.runs:
            table = next(table for table in (METHODS, RULES, COMPOSERS) if name in table)
            assert load(table[name]) is not None
        for part in system.parts:
            assert find_spec(f"rankloom.{part}") is not None, part


def test_public_names_answer_whether_or_not_their_modules_are_loaded():
    assert len(rankloom.list_systems()) == len(rankloom.list_systems()) == 191
    assert {m.name for m in rankloom.list_methods()} == set(METHODS)
    assert rankloom.methods.lora.LoRA is rankloom.LoRA


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_listed_facts_are_those_that_are_found(name):
    """`methods.json` is as `python tools/make_docs.py` writes it."""
    assert method(name) == found_facts(name)


def test_method_facts_are_found_by_building():
    facts = {m.name: m for m in list_methods()}
    assert facts["lora"].arxiv == "2106.09685"
    assert facts["rslora"].arxiv == "2312.03732"
    assert facts["rslora"].preset
    assert not facts["lora"].preset
    assert facts["lora"].mergeable
    assert not facts["hydralora"].mergeable
    assert facts["hydralora"].kinds == ("conv1d_transposed", "linear")
    assert facts["lora"].kinds == tuple(
        sorted(["conv1d", "conv1d_transposed", "conv2d", "conv3d", "embedding", "linear", "parameter"])
    )
    assert facts["lora_fa"].rules == ("projected_gradient",)
    assert facts["adalora"].rules == ("budget", "orthogonal")
    settings = {s.name: s for s in facts["rslora"].settings}
    assert settings["scaling"].default == "rslora"
    assert settings["r"].type == "a whole number from 1 to 65,536"
    inner = {s.name: s.default for s in facts["dora"].settings}["inner"]
    assert inner == {"name": "lora"}


def test_method_facts_are_json():
    import dataclasses

    assert json.loads(json.dumps([dataclasses.asdict(m) for m in list_methods()]))
