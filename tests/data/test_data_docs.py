"""What the pages about data show is read as they say."""

import json
import re
from pathlib import Path

import pytest

from rankloom.train.configfile import read_config
from rankloom.train.data import FORMATS, load
from rankloom.train.data.families import FAMILIES
from rankloom.train.data.template import TRAIN_ON

DOCS = Path(__file__).resolve().parents[2] / "docs" / "data"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)


def test_every_format_is_shown_and_recognised(write):
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    shown = re.findall(r"### (\w+)\n.*?```json\n(.*?)```", page, flags=re.S)
    assert {name for name, _ in shown} == set(FORMATS)
    for name, line in shown:
        row = json.loads(line)
        rows = [row, {**row, "label": "plant"}] if name == "classification" else [row]
        assert load(write(f"{name}.jsonl", rows)).format == name


def test_every_choice_is_named():
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    for name in (*FAMILIES, *TRAIN_ON, "plain", "raw"):
        assert f"`{name}`" in page


def test_the_example_data_are_read(write):
    [lines] = blocks("own.md", "json")
    assert len(load(write("train.jsonl", lines))) == 2


@pytest.mark.parametrize("text", blocks("own.md", "yaml"))
def test_the_example_runs_are_configurations(tmp_path, text):
    (tmp_path / "run.yaml").write_text(text)
    config = read_config(tmp_path / "run.yaml")
    assert config.need_data().source == "train.jsonl"
    assert config.need_out().startswith("runs/")
