"""One YAML, one dataclass, one set of flags: strict, exact, and naming the place of every mistake."""

import pytest
import yaml

import rankloom as rl
from rankloom.errors import FileError, RankloomError, SettingsError
from rankloom.settings import yamltext
from rankloom.train.config import RunConfig, as_data, from_data
from rankloom.train.configfile import dump, read_config

GOOD = """\
model: microworld
data:
  source: microworld:list_rotate#500
  batch_size: 16
plan:
  method: {name: dora, inner: {name: lora, r: 2}}
  target_modules: [q_proj, v_proj]
train:
  lr: 1e-3
  precision: no
out: runs/one
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def test_yaml_becomes_the_dataclass(file):
    config = read_config(file)
    assert config.model.path == "microworld"
    assert config.data.batch_size == 16
    assert config.plan == rl.Plan(rl.DoRA(rl.LoRA(r=2)), target_modules=("q_proj", "v_proj"))
    assert config.train.lr == 1e-3
    assert config.train.precision == "no"
    assert config.out == "runs/one"


def test_what_is_written_is_read_back_the_same(file):
    config = read_config(file, ["seed=7", "rules=[{name: lora_plus, ratio: 4}]", "patience=3", "betas=[0.8, 0.9]"])
    again = from_data(yaml.safe_load(dump(config)))
    assert as_data(again) == as_data(config)
    assert again.train == config.train
    assert again.train.seed == again.seed == 7
    assert again.plan.rules[0].ratio == 4


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        (["lr=3e-4"], lambda c: c.train.lr == 3e-4),
        (["train.lr=1"], lambda c: c.train.lr == 1.0),
        (["r=5"], lambda c: c.plan.method.inner.r == 5),
        (["plan.method.inner.r=5"], lambda c: c.plan.method.inner.r == 5),
        (["inner.r=5"], lambda c: c.plan.method.inner.r == 5),
        (["method=lora"], lambda c: c.plan.method == rl.LoRA()),
        (["r=3", "method=lora"], lambda c: c.plan.method == rl.LoRA(r=3)),
        (["method=dora"], lambda c: c.plan.method.inner.r == 2),
        (["method=rslora", "r=4"], lambda c: c.plan.method == rl.LoRA(r=4, scaling="rslora")),
        (["method=lora_fa"], lambda c: c.plan.rules[0].damping == 1e-8),
        (["target_modules=all-linear"], lambda c: c.plan.target_modules == "all-linear"),
        (["target_modules=[k_proj]"], lambda c: c.plan.target_modules == ("k_proj",)),
        (["rank_pattern.q_proj=4"], lambda c: c.plan.rank_pattern == {"q_proj": 4}),
        (["model=there"], lambda c: c.model.path == "there"),
        (["model.dtype=bfloat16", "model=there"], lambda c: (c.model.path, c.model.dtype) == ("there", "bfloat16")),
        (["data=x.jsonl"], lambda c: (c.data.source, c.data.batch_size) == ("x.jsonl", 16)),
        (["method=loftq", "bits=2"], lambda c: c.plan.store.bits == 2),
        (["bits=2", "method=qlora"], lambda c: c.plan.store.bits == 2),
        (["method=qlora", "store.bits=3"], lambda c: c.plan.store.bits == 3),
        (["store=uniform", "bits=8"], lambda c: c.plan.store.bits == 8),
        (["clip=null"], lambda c: c.train.clip is None),
        (["seed=3"], lambda c: c.seed == c.train.seed == 3),
    ],
)
def test_changes_by_path_and_by_leaf(file, changes, check):
    assert check(read_config(file, changes))


def test_no_file_is_all_defaults():
    assert read_config(None) == RunConfig()
    assert read_config(None, ["steps=3"]).train.steps == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lrr=1", "no setting 'lrr'; did you mean 'lr'"),
        ("train.stepz=1", "'train.stepz'; did you mean 'train.steps'"),
        ("dtype=float32", "may mean model.dtype or plan.dtype"),
        ("lr", "write a change as key=value"),
        ("lr=fast", "argument 'lr=fast': train.lr='fast': expected a number above 0, as in lr=0.001"),
        ("r=0", "argument 'r=0': plan.method.inner.r=0: expected a whole number from 1 to 65,536, as in r=8"),
        ("method=dorra", "did you mean 'dora'"),
        ("schedule=cosin", "did you mean 'cosine'"),
        ("train.seed=1", "argument 'train.seed=1': train.seed: the seed of a run stands at the top"),
        ("epochs=0", "argument 'epochs=0': data.epochs=0: expected a number above 0 or null"),
        ("lr=[1", "not YAML"),
        ("data={split: test}", "data: source is missing"),
        ("model={dtype: float32}", "model: path is missing"),
    ],
)
def test_a_wrong_change_names_itself_and_the_remedy(file, change, message):
    with pytest.raises(SettingsError) as error:
        read_config(file, [change])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  lr: 1e-3", "  lrr: 1e-3", "run.yaml, line 9: train: TrainSettings has no setting 'lrr'; did you mean 'lr'"),
        ("  lr: 1e-3", "  lr: -1", "run.yaml, line 9: train.lr=-1: expected a number above 0, as in lr=0.001"),
        ("r: 2", "rank: 2", "run.yaml, line 6: plan.method.inner: LoRA has no setting 'rank'"),
        ("batch_size: 16", "batch_size: x", "run.yaml, line 4: data.batch_size='x': expected a whole number from 1"),
        ("out: runs/one", "outt: runs/one", "run.yaml, line 11: the configuration: RunConfig has no setting 'outt'"),
        (
            "out: runs/one",
            "steps: 3",
            "line 11: the configuration: RunConfig has no setting 'steps'; it is train.steps",
        ),
        ("out: runs/one", "model: other", "run.yaml, line 11: 'model' is given twice"),
        ("name: dora", "name: dorra", "no method 'dorra'"),
        ("[q_proj, v_proj]", "[q_proj, v_proj", "run.yaml, line 8: not YAML"),
        ("out: runs/one", "seed: yes", "run.yaml, line 11: seed='yes': expected a whole number"),
    ],
)
def test_a_wrong_file_names_file_line_and_key(file, old, new, message):
    assert old in GOOD
    file.write_text(GOOD.replace(old, new))
    with pytest.raises(SettingsError) as error:
        read_config(file)
    assert message in str(error.value)


def test_two_ways_to_say_how_long_are_refused(file):
    with pytest.raises(SettingsError, match=r"train\.steps and data\.epochs"):
        read_config(file, ["epochs=2", "steps=3"])
    assert "steps" not in as_data(read_config(file, ["epochs=2"]))["train"]


def test_a_missing_or_foreign_file(tmp_path, file):
    with pytest.raises(FileError, match=r"did you mean 'run\.yaml'"):
        read_config(tmp_path / "runn.yaml")
    file.write_text("- a\n- b\n")
    with pytest.raises(SettingsError, match="expected settings"):
        read_config(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="UTF-8"):
        read_config(file)
    file.write_text("a: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(RankloomError, match=r"line 1: .*os\.system is no type of a setting"):
        read_config(file)


def value(text):
    return yamltext.parse(text, "value")[0]


def test_values_are_yaml_1_2():
    assert value("1e-3") == 0.001
    assert value("no") == "no"
    assert value("1:30") == "1:30"
    assert value("010") == 10
    assert value("true") is True
    assert value("null") is None
    assert value("[1, a]") == [1, "a"]
    assert value("") is None


def test_missing_sections_say_how_to_give_them():
    with pytest.raises(SettingsError, match="model=microworld"):
        RunConfig().need_model()
    with pytest.raises(SettingsError, match="data=FILE"):
        RunConfig().need_data()
