"""Settings are strict wherever they come from, and every refusal says what is wrong and what to write."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import yaml

import rankloom as rl
from rankloom import registry
from rankloom.errors import FileError, SettingsError
from rankloom.rules.sampling import RankSampling
from rankloom.settings import Count, Settings, Within, from_data, to_data, yamltext
from rankloom.settings.changes import changed
from rankloom.settings.reference import describe, find, reference
from rankloom.starts.split import LoftQ
from rankloom.store.base import Store
from rankloom.train.config import RunConfig, as_data, settings_table
from rankloom.train.configfile import config_of, dump, read_config
from rankloom.train.settings import TrainSettings

NAN, INF = float("nan"), float("inf")
RANK = "expected a whole number from 1 to 65,536"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rl.LoRA(r=1.5), f"LoRA.r=1.5: {RANK}, as in r=8"),
        (lambda: rl.LoRA(r=8.0), f"LoRA.r=8.0: {RANK}; write r=8"),
        (lambda: rl.LoRA(r=True), f"LoRA.r=True: {RANK}, as in r=8"),
        (lambda: rl.LoRA(r="8"), f"LoRA.r='8': {RANK}; write r=8"),
        (lambda: rl.LoRA(r=None), f"LoRA.r=None: {RANK}"),
        (lambda: rl.LoRA(r=10**9), f"LoRA.r=1000000000: {RANK}"),
        (lambda: rl.LoRA(r=10**5000), f"LoRA.r=a int: {RANK}"),
        (lambda: rl.LoRA(r=[8]), f"LoRA.r=[8]: {RANK}"),
        (lambda: rl.LoRA(r=NAN), f"LoRA.r=nan: {RANK}"),
        (lambda: rl.LoRA(lora_alpha=NAN), "LoRA.lora_alpha=nan: expected a number, as in lora_alpha=8.0"),
        (lambda: rl.LoRA(lora_alpha=INF), "LoRA.lora_alpha=inf: expected a number"),
        (lambda: rl.LoRA(lora_alpha="16"), "LoRA.lora_alpha='16': expected a number; write lora_alpha=16"),
        (lambda: rl.LoRA(lora_alpha=10**400), "LoRA.lora_alpha=1"),
        (lambda: rl.LoRA(lora_dropout="x"), "LoRA.lora_dropout='x': expected a number from 0 to below 1"),
        (lambda: rl.LoRA(lora_dropout=1), "LoRA.lora_dropout=1: expected a number from 0 to below 1"),
        (lambda: rl.LoRA(scaling="rslor"), "LoRA.scaling='rslor': expected one of 'standard', 'rslora'; did you mean"),
        (lambda: rl.LoRA(lora_bias="true"), "LoRA.lora_bias='true': expected true or false; write lora_bias=True"),
        (lambda: rl.LoRA(lora_bias=1), "LoRA.lora_bias=1: expected true or false"),
        (lambda: rl.DoRA(inner=None), "DoRA.inner=None: expected a method"),
        (lambda: rl.DoRA(inner="dorra"), "DoRA.inner: no method 'dorra'; did you mean 'dora'"),
        (lambda: rl.DoRA(inner={"name": "lora", "rr": 1}), "DoRA.inner: LoRA has no setting 'rr'; did you mean 'r'"),
        (lambda: rl.DoRA(inner="qlora"), "DoRA.inner: 'qlora' is a whole Plan, no method"),
        (lambda: rl.Plan(rl.LoRA(), target_modules=None), "Plan.target_modules=None: expected text or a list of texts"),
        (
            lambda: rl.Plan(rl.LoRA(), target_modules=7),
            "Plan.target_modules=7: expected text or a list of texts; write",
        ),
        (lambda: rl.Plan(rl.LoRA(), target_modules=["0", 7]), "Plan.target_modules[1]=7: expected text"),
        (lambda: rl.Plan(rl.LoRA(), rank_pattern={"q": 0}), f"Plan.rank_pattern.q=0: {RANK}"),
        (lambda: rl.Plan(rl.LoRA(), rank_pattern={1: 4}), "a key of Plan.rank_pattern=1: expected text"),
        (lambda: rl.Plan(rl.LoRA(), store=rl.LoRA()), "Plan.store=LoRA("),
        (lambda: rl.Plan(rl.LoRA(), rules=["budgt"]), "Plan.rules[0]: no rule 'budgt'; did you mean 'budget'"),
        (
            lambda: rl.Plan(rl.LoRA(), bias="al"),
            "Plan.bias='al': expected one of 'none', 'all', 'lora_only'; did you mean",
        ),
        (lambda: rl.NormalFloat(5), "NormalFloat.bits=5: expected one of 2, 3, 4, 8, as in bits=4"),
        (lambda: rl.NormalFloat(4, 0), "NormalFloat.block=0: expected a whole number from 1"),
        (lambda: rl.MixedBits(widths=()), "MixedBits.widths=[]: expected"),
        (lambda: rl.LoRAPlus(ratio=0), "LoRAPlus.ratio=0: expected a number above 0"),
        (lambda: LoftQ(iters=-1), "LoftQ.iters=-1: expected a whole number from 0"),
        (lambda: RankSampling(seed=1 << 64), "RankSampling.seed=18446744073709551616: expected a whole number"),
        (lambda: TrainSettings(lr=NAN), "TrainSettings.lr=nan: expected a number above 0, as in lr=0.001"),
        (lambda: TrainSettings(steps=0), "TrainSettings.steps=0: expected a whole number from 1"),
        (lambda: TrainSettings(betas=(0.9,)), "TrainSettings.betas=[0.9]: expected a list of 2"),
        (lambda: TrainSettings(betas=(0.9, 1.0)), "TrainSettings.betas[1]=1.0: expected a number from 0 to below 1"),
        (lambda: TrainSettings(optimizer="adam"), "TrainSettings.optimizer='adam': expected one of 'adamw'"),
        (lambda: TrainSettings(report_to=("wanb",)), "TrainSettings.report_to[0]='wanb': expected one of"),
        (lambda: dataclasses.replace(rl.LoRA(), r=0), f"LoRA.r=0: {RANK}"),
    ],
)
def test_construction_is_strict(make, message):
    with pytest.raises(SettingsError) as error:
        make()
    assert str(error.value).startswith(message)


def test_what_means_the_same_is_kept_in_one_form():
    plan = rl.Plan(
        rl.LoRA(np.int64(4), lora_alpha=np.float32(16)),
        target_modules=["q", "k"],
        modules_to_save={"b", "a"},
        layers_to_transform=3,
        alpha_pattern={"q": 2},
        store="uniform",
        rules=["lora_plus", {"name": "orthogonal", "weight": 1}],
    )
    assert (type(plan.method.r), type(plan.method.lora_alpha)) == (int, float)
    assert plan.target_modules == ("q", "k")
    assert plan.modules_to_save == ("a", "b")
    assert plan.layers_to_transform == (3,)
    assert plan.alpha_pattern == {"q": 2.0}
    assert plan.store == rl.Uniform()
    assert plan.rules[1].weight == 1.0
    assert rl.Plan("rslora").method == rl.LoRA(scaling="rslora")


def test_a_mapping_that_changes_later_changes_no_plan():
    ranks = {"q": 2}
    plan = rl.Plan(rl.LoRA(), rank_pattern=ranks)
    ranks["q"] = "x"
    assert plan.rank_pattern == {"q": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1: 2", "run.yaml, line 1: the key '1' is no text: write it in quotes"),
        ("~: 3", "line 1: the key '~' is no text"),
        ("out: x\ntrue: 3", "line 2: the key 'true' is no text"),
        ("? [a]\n: 1", "line 1: the key that is a list or mapping is no text"),
        ("plan:\n  rank_pattern: {0: 4}", "line 2: the key '0' is no text"),
        ("train: {warmup_ratio: .nan}", "run.yaml, line 1: train.warmup_ratio=nan: expected a number from 0"),
        ("train:\n  lr: .inf", "run.yaml, line 2: train.lr=inf: expected a number above 0"),
        ("seed: 99999999999999999999", "run.yaml, line 1: seed=99999999999999999999: expected a whole number"),
        ("seed: " + "9" * 5000, "is no int of at most 20 digits"),
        ("plan:\n  method: {name: lora, r: 1000000000}", f"run.yaml, line 2: plan.method.r=1000000000: {RANK}"),
        ("plan:\n  method: lora\n  r: 4", "run.yaml, line 3: plan: Plan has no setting 'r'; it is plan.method.r"),
        (
            "train:\n  learning_rate: 1",
            "run.yaml, line 2: train: TrainSettings has no setting 'learning_rate'; it is train.lr",
        ),
        ("seed: !!int x", "run.yaml, line 1: 'x' is no int"),
        ("seed: !!bool maybe", "line 1: 'maybe' is no bool"),
        ("seed: !!timestamp 2020-99-99", "run.yaml, line 1: tag:yaml.org,2002:timestamp is no type of a setting"),
        ('out: "a\\0b"', "run.yaml, line 1: out='a\\x00b': expected text"),
        ("plan:\n  method: &m {name: dora, inner: *m}", "run.yaml"),
        (
            "plan:\n  rules:\n    - lora_plus\n    - {name: budget, deltaT: 0}",
            "run.yaml, line 4: plan.rules[1].deltaT=0",
        ),
        ("data: {source: x, batch_size: 0}", "run.yaml, line 1: data.batch_size=0: expected a whole number from 1"),
        ("plan: {method: {name: [lora]}}", "plan.method.name=['lora']: expected the name of a method"),
        ("plan: 7", "run.yaml, line 1: plan=7: expected settings of Plan"),
    ],
)
def test_a_yaml_names_its_line(text, message):
    with pytest.raises(SettingsError) as error:
        config_of(text, "run.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed=99999999999999999999", "argument 'seed=99999999999999999999': seed=99999999999999999999: expected"),
        ("r=1000000000", f"argument 'r=1000000000': plan.method.r=1000000000: {RANK}"),
        ("lr=.nan", "argument 'lr=.nan': train.lr=nan: expected a number above 0"),
        ("learning_rate=1e-3", "there is no setting 'learning_rate'; it is lr"),
        ("store.bits=3", "there is no setting 'store.bits'"),
        ("store=normal_flot", "argument 'store=normal_flot': no store 'normal_flot'; did you mean 'normal_float'"),
        ("method.name=dorra", "argument 'method.name=dorra': no method 'dorra'; did you mean 'dora'"),
        (
            "rules=[lora_plu]",
            "argument 'rules=[lora_plu]': plan.rules[0]: no rule 'lora_plu'; did you mean 'lora_plus'",
        ),
        ("rank_pattern={1: 2}", "the key '1' is no text"),
        ("rank_pattern.q=x", "argument 'rank_pattern.q=x': plan.rank_pattern.q='x'"),
    ],
)
def test_an_argument_names_itself(change, message):
    with pytest.raises(SettingsError) as error:
        config_of("", "", [change])
    assert message in str(error.value)


@pytest.mark.timeout(20)
def test_only_a_plain_file_of_some_size_is_read(tmp_path):
    fifo = tmp_path / "run.yaml"
    os.mkfifo(fifo)
    with pytest.raises(FileError, match=r"run\.yaml is no regular file"):
        read_config(fifo)
    with pytest.raises(FileError, match="is no regular file"):
        read_config(Path("/dev/zero"))
    with pytest.raises(FileError, match="is no regular file"):
        read_config(tmp_path)
    large = tmp_path / "large.yaml"
    with large.open("wb") as file:
        file.truncate(6 << 30)
    with pytest.raises(FileError, match="6442450944 bytes"):
        read_config(large)
    good = tmp_path / "good.yaml"
    good.write_text("seed: 3")
    (tmp_path / "link.yaml").symlink_to(good)
    assert read_config(tmp_path / "link.yaml").seed == 3


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        (["inner.r=4", "inner.name=lora", "method=dora"], lambda p: p.method == rl.DoRA(rl.LoRA(r=4))),
        (["inner.name=hydralora", "inner.n_b=2", "method=slices"], lambda p: p.method.inner == rl.hydralora(n_b=2)),
        (["method=dora", "inner=dora", "inner.inner.r=2"], lambda p: p.method == rl.DoRA(rl.DoRA(rl.LoRA(r=2)))),
        (["method=dora", "inner=dora", "inner=lora"], lambda p: p.method == rl.DoRA(rl.LoRA())),
        (["store.bits=3", "store=normal_float"], lambda p: p.store == rl.NormalFloat(3)),
        (["store.name=uniform", "store.group=16"], lambda p: p.store == rl.Uniform(group=16)),
        (["method=qlora", "method.bits=3", "r=2"], lambda p: (p.store.bits, p.method.r) == (3, 2)),
        (["method=qlora", "store.bits=2"], lambda p: (p.store, p.method.r) == (rl.NormalFloat(2), 64)),
        (["method=dora", "inner.name=rslora", "inner.r=2"], lambda p: p.method.inner == rl.LoRA(r=2, scaling="rslora")),
        (["rules=[lora_plus]"], lambda p: p.rules == (rl.LoRAPlus(),)),
        (["rules=[{name: lora_plus, ratio: 4}]"], lambda p: p.rules == (rl.LoRAPlus(ratio=4),)),
        (["store=uniform", "start=loftq", "start.iters=1"], lambda p: p.start == LoftQ(1)),
        (["rank_pattern.layers.0.q_proj=4"], lambda p: p.rank_pattern == {"layers.0.q_proj": 4}),
    ],
)
def test_parts_inside_parts_by_name_in_any_order(changes, check):
    assert check(config_of("", "", changes).plan)
    keys = [change.partition("=")[0] for change in changes]
    if len(set(keys)) == len(keys):
        assert check(config_of("", "", changes[::-1]).plan)


class Gate(Settings):
    """A kind that the registry did not have."""


@dataclass(frozen=True)
class TopK(Gate):
    """`k`: experts that are asked."""

    k: Count = 1


@dataclass(frozen=True)
class Soft(Gate):
    """`heat`: divides the logits."""

    heat: Annotated[float, Within(0, open_below=True)] = 1.0


@dataclass(frozen=True)
class Mixed(Settings):
    """`gate`: chooses; `many`: several; `size`: small or large."""

    gate: Gate = field(default_factory=TopK)
    many: tuple[Gate, ...] = ()
    size: Literal["small", "large"] = "small"
    other: Mapping[str, Any] = field(default_factory=dict)


@pytest.fixture
def gates(monkeypatch):
    monkeypatch.setitem(registry._KINDS, "gate", {"topk": f"{__name__}:TopK", "soft": f"{__name__}:Soft"})
    monkeypatch.setitem(registry._BASES, "gate", f"{__name__}:Gate")


def test_a_new_kind_is_a_line_in_the_registry(gates):
    def make(*changes):
        return from_data(Mixed, changed(Mixed, {}, changes, {}, {}))

    assert make("gate.k=2") == make("k=2") == Mixed(TopK(2))
    assert make("heat=2", "gate=soft") == Mixed(Soft(2.0))
    assert make("many=[soft, {name: topk, k: 3}]").many == (Soft(), TopK(3))
    assert to_data(make("gate=soft", "other.a.b=1"), full=True) == {
        "gate": {"name": "soft", "heat": 1.0},
        "many": [],
        "size": "small",
        "other": {"a.b": 1},
    }
    with pytest.raises(SettingsError, match="no gate 'sofd'; did you mean 'soft'"):
        make("gate=sofd")
    with pytest.raises(SettingsError, match="no gate 'lora'"):
        from_data(Gate, "lora")


def test_a_part_of_another_kind_is_none_of_this(gates):
    with pytest.raises(SettingsError, match="no store 'lora'"):
        from_data(Store, "lora")
    with pytest.raises(SettingsError, match="no store 'mixed'"):
        from_data(Store, "mixed")


def test_a_config_says_every_choice_and_is_read_back():
    config = config_of("", "", ["method=dora", "store=normal_float", "model=m", "data=d.jsonl", "rules=[lora_plus]"])
    written = yamltext.parse(dump(config), "config.yaml")[0]
    assert written["plan"]["method"]["inner"] == {"name": "lora", **to_data(rl.LoRA(), full=True)}
    assert written["plan"]["store"] == {
        "name": "normal_float",
        "bits": 4,
        "block": 64,
        "double": True,
        "double_block": 256,
    }
    assert written["plan"]["rules"][0]["ratio"] == 16.0
    for section in ("model", "data", "plan", "train"):
        missing = {f.name for f in dataclasses.fields(getattr(config, section))} - written[section].keys()
        assert missing == ({"seed"} if section == "train" else set())
    assert config_of(dump(config), "config.yaml") == config
    assert as_data(config) == written


@pytest.mark.parametrize(
    "text",
    ["no", "1e-3", "010", "1:30", "~", "null", "true", " x ", "a: b", "é\u2028", "2020-01-01", "0x1", ".nan", "<<", ""],
)
def test_text_stays_text_for_every_yaml(text):
    import yaml

    written = yamltext.dump({"out": text})
    assert yamltext.parse(written, "x")[0] == {"out": text}
    assert yaml.safe_load(written) == {"out": text}


def test_the_reference_knows_every_setting_of_a_run():
    fields = settings_table()
    names = {f.name for f in fields}
    assert {"train.lr", "model.path", "plan.target_modules", "plan.method", "plan.method.r", "seed"} <= names
    undocumented = [f.name for f in fields if not f.doc and not f.name.startswith("plan.method.")]
    assert undocumented == []
    lr = find(fields, "lr")
    assert [(f.name, f.type, f.default, f.doc) for f in lr] == [("train.lr", "a number above 0", 0.001, "peak rate")]
    assert {f.name for f in find(fields, "model")} >= {"model.path", "model.dtype"}
    with pytest.raises(SettingsError, match="did you mean 'lr'"):
        find(fields, "lrr")
    of_preset = {f.name: f.default for f in describe(registry.maker("qlora"), rl.Method)}
    assert (of_preset["r"], of_preset["bits"], of_preset["lora_dropout"]) == (64, 4, 0.0)
    assert [f.name for f in settings_table("uniform")] == ["store uniform.bits", "store uniform.group"]
    assert "plan.method.inner.r" in {f.name for f in reference(RunConfig, {"plan": {"method": "dora"}})}


def test_listing_methods_costs_no_torch():
    code = (
        "import sys\nfrom rankloom.cli.commands import app\n"
        "app(['methods', '--json'], standalone_mode=False)\napp(['methods', 'dora'], standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'yaml', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("said", ["\x85", "a\u2028b", "\u2029", "\ufeffa", "a\rb", "\r\n", "tab\t end ", "é", "\x07"])
def test_a_text_of_any_letters_is_written_and_read_back(said):
    written = yamltext.dump({"name": said, "list": [said]})
    assert yamltext.parse(written, "text")[0] == {"name": said, "list": [said]}
    assert yaml.safe_load(written) == {"name": said, "list": [said]}
