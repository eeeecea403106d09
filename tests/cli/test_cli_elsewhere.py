"""Whoever comes from another trainer is told what their setting is called here, and what is told works when it is typed."""

import re
import shlex
from pathlib import Path

import pytest

from rankloom.errors import SettingsError
from rankloom.settings.changes import ends, spots
from rankloom.train.config import RunConfig
from rankloom.train.configfile import read_config
from rankloom.train.elsewhere import ELSEWHERE, PROGRAMS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "coming"
GIVEN = {
    "lr": "1e-3",
    "eps": "1e-8",
    "clip": "0.5",
    "schedule": "linear",
    "target_modules": "[q_proj]",
    "modules_to_save": "lm_head",
    "model.dtype": "bfloat16",
    "packing": "true",
    "lora_dropout": "0.1",
    **dict.fromkeys(("model", "data", "out", "eval_source", "split", "eval_split", "cache"), "there"),
}
"""Values that go with settings which take no whole number."""


def message(*changes, file=None):
    with pytest.raises(SettingsError) as error:
        read_config(file, changes)
    return str(error.value)


def value_of(word):
    return GIVEN.get(word.setting, "3")


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_what_is_told_works_when_it_is_typed(name):
    word = ELSEWHERE[name]
    said = message(f"{name}={value_of(word)}")
    assert f"there is no setting {name!r}" in said
    assert word.note in said
    written = re.search(r": write (.*?)(?: \(|$)", said)
    if word.ours and not written:
        assert word.note, "neither a change to write nor a word on what to write"
    if written:
        [change] = shlex.split(written[1])
        read_config(None, ["model=x", "data=x.jsonl", change])


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_every_setting_that_is_told_exists_and_every_example_is_taken(name):
    word = ELSEWHERE[name]
    method = "qa_lora" if word.setting == "group_size" else "lora"
    there = {spot.path: spot for spot in spots(RunConfig, {"plan": {"method": method}})}
    assert not word.ours or len(ends(tuple(word.setting.split(".")), there)) == 1
    for example in re.findall(r"as in (\S+=(?:[\[{].*[\]}]|[\w#.]+))", word.note):
        read_config(None, ["model=x", "data=x.jsonl", example])


def test_a_name_means_the_same_everywhere():
    for words in PROGRAMS.values():
        for name, word in words.items():
            assert ELSEWHERE[name] == word


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("train:\n  learning_rate: 1e-3\n", "line 2: train: TrainSettings has no setting 'learning_rate'; it is train.lr"),
        ("learning_rate: 1e-3\n", "it is train.lr"),
        ("data:\n  source: x\n  cutoff_len: 9\n", "line 3: data: DataSettings has no setting 'cutoff_len'; it is data.max_length"),
        ("plan: {method: lora, r: 4}\n", "it is plan.method.r"),
        ("plan: {method: dora, r: 4}\n", "it is plan.method.inner.r"),
        ("plan: {method: lora, lora_r: 4}\n", "it is plan.method.r"),
        ("r: 4\n", "it is plan.method.r"),
        ("method: lora\n", "it is plan.method"),
        ("plan: {method: {name: lora, rank: 4}}\n", "it is plan.method.r"),
        ("bf16: true\n", "it is train.precision: bf16"),
        ("bf16: false\n", "it is train.precision: leave it out"),
        ("plan: {load_in_4bit: true}\n", "it is plan.store: normal_float"),
        ("data:\n  source: x\n  val_set_size: 0.05\n", "it is data.hold_out (a number of records"),
        ("flash_attention: true\n", "it has no counterpart: leave it out"),
        ("train:\n  batch_size: 3\n", "it is data.batch_size"),
    ],
)  # fmt: skip
def test_keys_of_a_file(yaml, said, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml)
    assert said in message(file=tmp_path / "run.yaml")


@pytest.mark.parametrize("change", ["fp16=false", "load_in_8bit=False", "load_in_4bit=no", "use_dora=0"])
def test_what_was_switched_off_is_to_be_left_out(change):
    assert message(change).endswith(": leave it out")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lr", "1e-3"], "error: there is no option --lr: settings are written key=value: lr=1e-3"),
        (["--lr=1e-3"], "lr=1e-3"),
        (["--train.lr", "1e-3"], "train.lr=1e-3"),
        (["--learning-rate", "1e-3"], "it is lr: write lr=1e-3"),
        (["--per_device_train_batch_size=4"], "write batch_size=4"),
        (["--bf16"], "write precision=bf16"),
        (["--bf16", "--lr", "3"], "write precision=bf16"),
        (["--packing"], "packing=true"),
        (["model=x", "--num_train_epochs", "3", "out=y"], "write epochs=3"),
        (["--resum", "auto"], "did you mean '--resume'"),
        (["--config", "run.yaml"], "rankloom train run.yaml"),
        (["--nothing", "3"], "settings are written key=value"),
    ],
)
def test_settings_written_as_options(run, flags, said):
    for command in ("train", "plan", "eval") if "--resum" not in flags else ("train",):
        found = run(command, *flags)
        assert found.code == 2
        assert said in found.err
        assert len(found.err.strip().splitlines()) == 1


def test_options_of_a_command_stay_its_own(run):
    assert run("limits", "--lr", "3").code == 2
    assert run("settings", "lr", "--json").json[0]["name"] == "train.lr"


def test_one_word_is_a_list_of_one():
    config = read_config(None, ["modules_to_save=lm_head", "target_modules=q_proj", "store=uniform"])
    assert config.plan.modules_to_save == ("lm_head",)
    assert read_config(None, ["modules_to_save=[lm_head, embed_tokens]"]).plan.modules_to_save[1] == "embed_tokens"
    assert read_config(None, ["context=task"]).train.context == ("task",)


@pytest.mark.parametrize("prompt", ["x=5 solve", "r=5", "lr=high and low", "is_it=so"])
def test_a_prompt_with_an_equals_sign_is_told_the_option(run, model, prompt):
    found = run("generate", f"model={model}", prompt) if prompt != "r=5" else None
    if found is not None:
        assert found.code == 2
        assert f"-p {shlex.quote(prompt)}" in found.err
    done = run("generate", f"model={model}", "--max-new-tokens", "2", "-p", prompt, "--json")
    assert done.json[0]["prompt"] == prompt


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_the_runs_of_the_pages_are_configurations(page, tmp_path):
    for text in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
        (tmp_path / "run.yaml").write_text(text)
        assert read_config(tmp_path / "run.yaml").need_out().startswith("runs/")
