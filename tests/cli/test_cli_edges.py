"""Nothing that a file says commands the terminal, whichever way it comes out."""

from __future__ import annotations

import io
import json
import shutil
import sys
import warnings

import pytest

from rankloom.cli.command import guarded
from rankloom.cli.screen import Screen, screen
from rankloom.errors import CONTROL, FileError
from rankloom.train.report import Progress

EVIL = "a\x1b]0;X\x07\x9b31m\u202eb\ud800[bold]c[/bold]"
LINES = "a\n\nerror: forged"


def printed(work, capsys, machine=False):
    with screen(machine) as out:
        work(out)
    found = capsys.readouterr()
    assert not CONTROL.search(found.out + found.err)
    return found.out


WORKS = {
    "text": lambda out: out.text(EVIL),
    "table": lambda out: out.table((EVIL, "b"), [(EVIL, [EVIL])], title=EVIL),
    "facts": lambda out: out.facts([(EVIL, EVIL)]),
    "stage": lambda out: out.stage("data", EVIL),
}


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_on_the_screen(work, capsys):
    assert r"\x1b]0;X\x07\x9b31m\u202eb\ud800[bold]c[/bold]" in printed(work, capsys).replace("\n", "")


def test_a_fact_is_one_line(capsys):
    assert printed(lambda out: out.facts([("name", LINES)]), capsys) == "name  a error: forged\n"


def test_as_json_it_is_the_same_text(capsys):
    data = {EVIL: [EVIL, {"x": LINES}]}
    assert json.loads(printed(lambda out: out.result(data), capsys, machine=True)) == data


def test_in_errors_and_warnings(capsys):
    def fails():
        sys.stderr.write(warnings.formatwarning(f"{EVIL}\n{LINES}", UserWarning, "file.py", 1))
        raise OSError(2, "No such file", EVIL)

    with pytest.raises(Exception, match="1"):
        guarded(fails)()
    said = capsys.readouterr().err
    assert not CONTROL.search(said)
    assert said.splitlines()[0].startswith("warning: a\\x1b]0;X")
    assert said.splitlines()[1].startswith("error: a\\x1b]0;X")
    assert len(said.splitlines()) == 2
    assert not CONTROL.search(str(FileError(EVIL)))


def test_in_the_line_of_an_evaluation(monkeypatch):
    from rich.console import Console

    bar = Progress(3, 0)
    bar.bar.stop()
    seen = io.StringIO()
    monkeypatch.setattr(bar.bar.live, "console", Console(file=seen, force_terminal=False, width=200))
    bar.row({"event": "eval", "step": 1, "metrics": {EVIL: 1.0}})
    assert r"step 1: a\x1b]0;X\x07\x9b31m\u202eb\ud800[bold]c[/bold] 1" in seen.getvalue()
    assert not CONTROL.search(seen.getvalue())


def test_info_of_a_strangers_folders(run, model, tmp_path):
    made = shutil.copytree(model, tmp_path / "m")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "model_type": EVIL, "architectures": [EVIL]}))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"peft_type": EVIL, EVIL: EVIL}))
    (tmp_path / "r").mkdir()
    record = {"before": {EVIL: 1}, "after": {EVIL: EVIL}, "config": {"model": EVIL, "data": [EVIL]}, "steps": EVIL}
    (tmp_path / "r" / "run.json").write_text(json.dumps(record))
    for folder in ("m", "a", "r"):
        found = run("info", tmp_path / folder)
        assert not CONTROL.search(found.out + found.err), folder
    assert Screen(False).data is not None
