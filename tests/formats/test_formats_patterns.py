"""No regular expression of a file hangs, whatever field it stands in, when it is read or when it is saved again."""

from __future__ import annotations

import json
import time
import warnings

import pytest
import torch
from formats_tiny import X, adapted, bare, config, edit_config, net
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rankloom as rl
from rankloom.errors import FileError

BOMBS = ["(.|.){26}!", ".?" * 26 + "!", "(.|.)" * 30 + "!", "(?=(.|.){30}!)q", "((.*)*x)*!"]
FIELDS = {
    "target_modules": lambda bomb: {"target_modules": bomb},
    "exclude_modules": lambda bomb: {"exclude_modules": bomb},
    "rank_pattern": lambda bomb: {"rank_pattern": {bomb: 4}},
    "alpha_pattern": lambda bomb: {"alpha_pattern": {bomb: 6.0}},
    "layers_pattern": lambda bomb: {"layers_to_transform": [0, 1], "layers_pattern": [bomb]},
    "modules_to_save": lambda bomb: {"modules_to_save": [bomb]},
    "target_parameters": lambda bomb: {"target_parameters": [bomb]},
    "trainable_token_indices": lambda bomb: {"trainable_token_indices": {bomb: [1]}},
}
NATIVE = {
    **{field: FIELDS[field] for field in ("target_modules", "exclude_modules", "rank_pattern", "layers_pattern")},
    "target_parameters": lambda bomb: {"target_parameters": bomb},
    "store_skip_modules": lambda bomb: {"store": "normal_float", "store_skip_modules": [bomb]},
}


def opened(folder):
    """The bank and the seconds of work that it took; None and the message where the folder is refused."""
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, said = rl.load(net(), folder), ""
    except FileError as error:
        found, said = None, str(error)
    assert time.process_time() - start < 1.0
    return found, said


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
@pytest.mark.parametrize("field", FIELDS)
def test_in_a_peft_folder(field, bomb, tmp_path):
    folder = bare(tmp_path / "a")
    edit_config(folder, **FIELDS[field](bomb))
    bank, said = opened(folder)
    if bank is None:
        assert "adapter_config.json" in said
        return
    assert field in ("exclude_modules", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters")
    assert torch.equal(bank.model(X), adapted()(X))
    start = time.process_time()
    rl.save(bank.model, tmp_path / "b")
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
@pytest.mark.parametrize("field", NATIVE)
def test_in_a_native_plan_and_in_a_manifest(field, bomb, tmp_path):
    rl.save(adapted(rl.hydralora(r=2)), tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    plan = config(tmp_path / "a")["plan"]
    edit_config(tmp_path / "a", plan={**plan, **NATIVE[field](bomb)})
    bank, said = opened(tmp_path / "a")
    assert bank is None
    assert "adapter_config.json" in said


def test_a_pattern_that_names_nothing_contradicts_the_tensors(tmp_path):
    folder = bare(tmp_path / "a")
    edit_config(folder, target_modules=r"((((([\w.])+)+)+)+)+!")
    assert "has tensors for 'layers.0.q', which target_modules=" in opened(folder)[1]
    edit_config(folder, target_modules=r"(((((layers\.)+)+)+\d\.)+)+(q|v)")
    assert opened(folder)[0].plans["default"].target_modules == config(folder)["target_modules"]


def test_many_patterns_together(tmp_path):
    folder = bare(tmp_path / "a")
    for patterns in ({f"(.|.){{26}}{i}!": 4 for i in range(500)}, {"(.|.)" * 300 + f"{i}": 4 for i in range(300)}):
        edit_config(folder, rank_pattern=patterns)
        bank, said = opened(folder)
        assert bank is None
        assert "rank_pattern" in said
    edit_config(folder, rank_pattern={rf"^layers\.{i}\.q": 4 for i in range(500)})
    assert opened(folder)[0] is not None


PARTS = st.sampled_from([".", "q", r"\w", "(a|.)", ".*", "[^!]?", r"\.", "(?:.|q)"])
WILD = st.recursive(
    PARTS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{9}", "{0,40}", "{2,}"])).map(lambda p: f"(?:{p[0]}){p[1]}"),
        st.tuples(inner, inner).map(lambda p: f"({p[0]}|{p[1]})"),
        st.tuples(inner, inner).map("".join),
        inner.map(lambda p: (p * 30)[: len(p) * (200 // len(p))]),
    ),
    max_leaves=6,
)


@given(WILD, st.sampled_from(sorted(FIELDS)))
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_generated_ones(tmp_path, expression, field):
    folder = tmp_path / "a"
    if not folder.exists():
        bare(folder)
        (tmp_path / "config").write_text(json.dumps(config(folder)))
    (folder / "adapter_config.json").write_text((tmp_path / "config").read_text())
    edit_config(folder, **FIELDS[field](f"{expression}!"))
    opened(folder)


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
@pytest.mark.parametrize("native", [False, True])
def test_in_a_field_of_a_method(native, bomb, tmp_path):
    """IA3's feedforward_modules is one more expression that a file brings."""
    folder, model = tmp_path / "a", net()
    rl.attach(model, rl.IA3(), target_modules="all-linear")
    rl.save(model, folder)
    (folder / "manifest.json").unlink()
    if native:
        plan = {"method": {"name": "ia3", "feedforward_modules": bomb}}
        edit_config(folder, format="rankloom", plan=plan, peft_type="RANKLOOM")
    else:
        edit_config(folder, feedforward_modules=bomb)
    bank, said = opened(folder)
    if bank is None:
        assert "adapter_config.json" in said or "adapter_model" in said
        return
    start = time.process_time()
    rl.save(bank.model, tmp_path / "b")
    assert time.process_time() - start < 2.0
