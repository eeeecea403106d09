"""The words of the README and of the pattern page are run as they stand, and generated pages are up to date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("page", ["README.md", "docs/pattern.md", "docs/coming/peft.md", "docs/coming/trl.md"])
def test_python_blocks_run(page: str, tmp_path: Path) -> None:
    found = blocks(page, "python")
    assert found
    script = tmp_path / "page.py"
    script.write_text("\n".join(found), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_quickstart_leaves_a_folder_that_peft_loads(tmp_path: Path) -> None:
    quickstart = blocks("README.md", "python")[0]
    script = tmp_path / "quick.py"
    script.write_text(
        quickstart
        + "\nfrom peft import PeftModel\n"
        + "ids = torch.randint(0, 500, (2, 9)) if (torch := __import__('torch')) else None\n"
        + "ours = model(input_ids=ids).logits.detach()\n"
        + "plain, _ = load_model('microworld')\n"
        + "theirs = PeftModel.from_pretrained(plain, 'adapter').eval()(input_ids=ids).logits.detach()\n"
        + "print((ours - theirs).abs().max().item())\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.strip().splitlines()[-1]) < 1e-3


def test_every_command_in_the_readme_exists() -> None:
    from rankloom.cli import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands}
    shown = {
        line.split()[1]
        for block in blocks("README.md", "sh")
        for line in re.split("[\n;]", block)
        if " rankloom " in f" {line}" and line.strip().startswith("rankloom")
    }
    assert shown
    assert shown <= known, shown - known


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "tools/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"run `python tools/make_docs.py`: stale {done.stdout}{done.stderr[-2000:]}"


def test_torch_is_on_one_thread() -> None:
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_plan(example: Path) -> None:
    import json

    from typer.testing import CliRunner

    from rankloom.cli import app

    done = CliRunner().invoke(app, ["plan", str(example), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)
