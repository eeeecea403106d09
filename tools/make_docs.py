"""Generate the pages that tables and docstrings already know: methods, systems, parity, the README's table.

python tools/make_docs.py            write them
python tools/make_docs.py --check    fail if a page on disk differs
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankloom as rl
from rankloom.core.method import Method
from rankloom.core.plan import as_plan, default_plan
from rankloom.errors import NotMergeable, RankloomError
from rankloom.formats.limits import table
from rankloom.registry import METHODS, RULES, STARTS, STORES, kinds_with, load
from rankloom.settings import settings_of
from rankloom.settings.reference import Field, describe, reference
from rankloom.systems import found_facts
from rankloom.train.config import RunConfig
from rankloom.train.elsewhere import AXOLOTL, LLAMA_FACTORY, PEFT, TRL, Word

ROOT = Path(__file__).resolve().parents[1]
END = "<!-- end -->"

STRANGERS = (
    "## A stranger's folder",
    "",
    "- No file turns on a model's own Python code, nor does a question at the terminal: `trust_remote_code=true` counts in",
    "  the command alone. A file that asks for it is refused by file and line.",
    "- `rankloom train RUN` writes into RUN, wherever it has been moved and whatever its `config.yaml` says; a `data.cache`",
    "  that it names has to be said again. The base model and the data that it names are read where they are.",
    "- A model's folder is looked through first: pipes, devices, links that leave it, an adapter among its files, and an",
    "  index that names files elsewhere are refused.",
    "- What files say comes out as text: no control characters reach a terminal, no Markdown or HTML a model card.",
)


class Stack(nn.Module):
    """Stacked experts: a bare parameter [E, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 12, 8) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->beo", x, self.experts)


def places() -> dict[str, tuple[nn.Module, dict[str, object]]]:
    """One tiny model for each kind of place, and how to target it."""
    return {
        "Linear": (nn.Sequential(nn.Linear(8, 12)), {"target_modules": ["0"]}),
        "Embedding": (nn.Sequential(nn.Embedding(9, 12)), {"target_modules": ["0"]}),
        "Conv1d": (nn.Sequential(nn.Conv1d(4, 6, 3)), {"target_modules": ["0"]}),
        "Conv2d": (nn.Sequential(nn.Conv2d(4, 6, 3)), {"target_modules": ["0"]}),
        "Conv3d": (nn.Sequential(nn.Conv3d(4, 6, 3)), {"target_modules": ["0"]}),
        "stacked parameter": (Stack(), {"target_modules": [], "target_parameters": ["experts"]}),
    }


def small(name: str, **settings: object) -> rl.Plan:
    """The method's plan at rank 2, where it has a rank."""
    known = {setting.name for setting in settings_of(load(METHODS[name]), Method)}
    ranks = {k: v for k, v in {"r": 2, "init_r": 2, "target_r": 1, "group_size": 2}.items() if k in known}
    try:
        return default_plan(name, **{**ranks, **settings})
    except RankloomError:  # ranks that do not go with its other settings
        return default_plan(name, **settings)


def accepted(name: str) -> tuple[list[str], bool | None]:
    """Kinds of place that the method takes, and whether it merges there."""
    kinds, merges = [], None
    for kind, (model, where) in places().items():
        try:
            bank = rl.attach(model, small(name), **where)
        except RankloomError:
            continue
        kinds.append(kind)
        try:
            bank.merge("default")
            merges = merges is not False
        except NotMergeable:
            merges = False
    return kinds, merges


def inside_dora(name: str) -> bool:
    """True where DoRA can turn the method's change."""
    try:
        bank = rl.attach(nn.Sequential(nn.Linear(8, 12)), rl.DoRA(small(name).method), target_modules=["0"])
        bank.merge("default")
    except RankloomError:
        return False
    return True


def cost(name: str) -> str:
    """Trainable numbers on one 4096 × 4096 linear layer at the method's defaults."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 4096, bias=False))
    try:
        bank = rl.attach(model, default_plan(name), target_modules=["0"])
    except RankloomError:
        return "does not apply to a 4096 × 4096 linear layer"
    trained = sum(p.numel() for _, p, _ in bank.trainable())
    return f"{trained:,} trained numbers on a 4096 × 4096 layer with default settings ({trained / 4096**2:.2%} of it)"


def settings_table(fields: list[Field]) -> str:
    """setting | takes | default | meaning."""
    rows = ["| setting | takes | default | meaning |", "|---|---|---|---|"]
    rows += [
        f"| `{f.name}` | {f.type} | `{json.dumps(f.default, ensure_ascii=False)}` | {f.doc} |".replace(
            " | | ", " |  | "
        )
        for f in fields
    ]
    return "\n".join(rows)


def settings_page() -> str:
    """Every setting of a run, and of the parts that can be chosen in it."""
    lines = [
        "# Settings",
        "",
        "One tree of settings: a YAML file has it as nested mappings, the command line as `path=value` with the full path or",
        "its end (`train.lr=1e-3`, `lr=1e-3`), Python as dataclasses. A part is chosen by name and has settings of its own:",
        "`method=dora inner.r=4 store=normal_float store.bits=3 rules=[lora_plus]`. `rankloom settings lr` prints a row,",
        "`rankloom settings dora` those of a part. Types are strict: text is no number, `true` is no count, numbers are",
        "finite.",
        "",
        settings_table(reference(RunConfig)),
        "",
    ]
    for title, kind, names in (("Rules", "rule", RULES), ("Starts", "start", STARTS), ("Stores", "store", STORES)):
        lines += [f"## {title}", ""]
        for name in names:
            base, made = kinds_with(name)[kind]
            lines += [f"### `{name}`", "", inspect.cleandoc(made.__doc__ or "").partition("\n\n")[0], ""]
            lines += [settings_table(describe(made, base)), ""] if describe(made, base) else []
    return "\n".join(lines)


def method_table() -> str:
    """`methods.json`: the facts of every registered method, a line for each."""
    rows = [json.dumps(dataclasses.asdict(found_facts(name)), ensure_ascii=False) for name in sorted(METHODS)]
    return "[\n" + ",\n".join(rows) + "\n]\n"


def method_page(name: str) -> str:
    """Equation, knobs, cost, paper, and what it composes with."""
    found = load(METHODS[name])
    plan = as_plan(small(name), {})
    cls = found if isinstance(found, type) and issubclass(found, Method) else type(plan.method)
    doc = inspect.getdoc(inspect.getmodule(found) if found is cls else found) or ""
    title, _, body = doc.partition("\n")
    kinds, merges = accepted(name)
    rules = ", ".join(f"`{type(r).__name__}`" for r in [*plan.rules, *plan.method.rules()]) or "none"
    lines = [
        f"# `{name}`",
        "",
        f"**{title.strip()}**",
        "",
        body.strip(),
        "",
        "## Settings",
        "",
        inspect.cleandoc(cls.__doc__ or ""),
        "",
        settings_table(describe(found, Method)),
        "",
        "## Cost and composition",
        "",
        f"- {cost(name)}",
        f"- Places: {', '.join(kinds)}",
        f"- Merges into the base: {'yes' if merges else 'no, its change depends on the input'}",
        f"- Inside `DoRA(…)`: {'yes' if name != 'dora' and inside_dora(name) else 'no'}",
        f"- Training rules it brings: {rules}",
        "",
        "Places and composition on this page are tried, not declared.",
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def systems_table(rows: list[object]) -> str:
    """id | name | section | status | proof."""
    out = ["| id | system | section | status | proof |", "|---|---|---|---|---|"]
    for row in rows:
        proof = f"`{row.proof}`" if row.proof else ""  # type: ignore[attr-defined]
        out.append(f"| `{row.id}` | {row.name} | {row.section} | {row.status} | {proof} |")  # type: ignore[attr-defined]
    return "\n".join(out)


def quantised(result: dict[str, Any]) -> str:
    """The tables of bench/quantised.py."""
    lines = [
        f"`bench/quantised.py` on one CPU thread: the embedded base, rank {result['r']} on all linear layers, "
        f"{result['steps']} steps on `{result['task']}`, a skill that the base never saw. Perplexity is that of held-out "
        "texts of its world, before and after the fine-tuning; L²QER needs none and is best read by the first.",
        "",
        "| width | method | bits each | perplexity at the start | held-out skill | its loss | perplexity after |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['width']} | {r['method']} | {r['bits']:.2f} | {r['start_perplexity']:.3f} | {r['exact_match']:.0%} | "
        f"{r['loss']:.3f} | {r['end_perplexity']:.3f} |"
        for r in result["rows"]
    ]
    lines += [
        "",
        "Peak memory of one LoRA step on 69 M weights and 256 tokens, each store in a process of its own:",
        "",
        "| store | weights | peak |",
        "|---|---|---|",
    ]
    lines += [f"| {m['store']} | {m['weights_mb']:.0f} MB | {m['peak_mb']:.0f} MB |" for m in result["memory"]]
    return "\n".join(lines)


def gates(rows: list[dict[str, Any]]) -> str:
    """The gates as last measured."""
    lines = ["| gate | ours | PEFT | limit | bound | held |", "|---|---|---|---|---|---|"]
    for row in rows:
        numbers = ("–" if row[key] is None else f"{row[key]:.4g}" for key in ("ours", "peft", "limit", "bound"))
        lines.append(f"| {row['gate']} | {' | '.join(numbers)} | {'yes' if row['ok'] else '**no**'} |")
    return "\n".join(lines)


def orders(rows: list[dict[str, Any]]) -> str:
    """Training steps at high ranks, by the order of products."""
    lines = ["| r | ours | ours, thin order alone | PEFT |", "|---|---|---|---|"]
    lines += [f"| {row['r']} | {row['ours']:.3f} | {row['thin']:.3f} | {row['peft']:.3f} |" for row in rows]
    return "\n".join(lines)


def on_a_gpu(reached: list[dict[str, Any]], steps: dict[str, Any], kernels: dict[str, Any]) -> str:
    """Gates, training steps and kernels as last measured on a GPU."""
    lines = [
        gates(reached),
        "",
        f"{steps['device']}, torch {steps['torch']}, {steps['rows']} × {steps['tokens']} tokens in bf16:",
        "",
        "| step | ratio to the limit | ms | kept for backward, GB | peak above the weights, GB |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {v['ratio']:.3f} | {v['ms']:.0f} | {v['kept_MB'] / 1e3:.1f} | {v['peak_MB'] / 1e3:.1f} |"
        for name, v in steps["variants"].items()
    ]
    lines += ["", "Forward and backward, replayed as a CUDA graph:", "", "| step | ratio to the limit's replay | ms |"]
    lines += ["|---|---|---|"]
    lines += [f"| {name} | {v['ratio']:.3f} | {v['ms']:.0f} |" for name, v in steps["captured"].items()]
    lines += [
        "",
        f"Kernels on a 4096 × 4096 layer in bf16, beside plain torch and bitsandbytes; the roofline is the "
        f"{kernels['bytes_per_second'] / 1e12:.1f} TB/s that a copy reaches:",
        "",
        "| kernel | µs | torch | bitsandbytes | of the roofline |",
        "|---|---|---|---|---|",
    ]
    for row in kernels["rows"]:
        peer = "–" if row["bitsandbytes_us"] is None else f"{row['bitsandbytes_us']:.1f}"
        lines.append(f"| {row['what']} | {row['us']:.1f} | {row['torch_us']:.0f} | {peer} | {row['roofline']:.0%} |")
    return "\n".join(lines)


def filled(text: str, name: str, body: str) -> str:
    """A page with the part between its two marks generated."""
    start = f"<!-- generated: {name} -->"
    head, rest = text.split(start)
    return f"{head}{start}\n{body}\n{END}{rest.split(END, 1)[1]}"


def performance() -> str:
    """The page of the gates."""
    results = ROOT / "bench" / "results"
    reached, order, there, steps, kernels = (
        json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("gates", "order", "gpu", "gpu_steps", "gpu_kernels")
    )
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    made = {"gates": gates(reached), "order": orders(order), "gpu": on_a_gpu(there, steps, kernels)}
    for name, body in made.items():
        page = filled(page, name, body)
    return page


def reliability_page() -> str:
    """The board as last measured, and the limits of the gate."""
    rows = json.loads((ROOT / "bench" / "results" / "reliability.json").read_text(encoding="utf-8"))["rows"]
    board = ["| # | promise | holds | figure | every sabotage noticed |", "|---|---|---|---|---|"]
    words = {True: "yes", False: "**no**", None: "not tried"}
    for row in rows:
        cells = (row["row"], row["promise"], words[row["ok"]], row["figure"], words[row["sabotage_red"]])
        board.append("| " + " | ".join(map(str, cells)) + " |")
    limits = ["| limit | largest | of |", "|---|---|---|"]
    limits += [f"| `{name}` | {value:,} | {what} |" for name, value, what in table()]
    return "\n".join(
        [
            "# Reliability",
            "",
            "Each row is a promise that `make reliability` measures. A sabotage breaks the product on purpose; a row",
            "counts only if its measurement notices every one. Each figure says how much was tried; `make reliability` tries",
            "everything, `python bench/reliability.py --quick` the part that `make test` has.",
            "",
            *board,
            "",
            *STRANGERS,
            "",
            "## Limits",
            "",
            "What an adapter folder may hold before it is refused (`rankloom limits`); each is an argument:",
            "`rankloom.load(model, folder, limits=Limits(rank=8192))`, from `rankloom.formats.limits`.",
            "",
            *limits,
            "",
        ]
    )


def names_table(words: Mapping[str, Word]) -> str:
    """Another program's settings and ours."""
    rows = ["| there | here | |", "|---|---|---|"]
    for name, word in sorted(words.items()):
        ours = f"`{word.setting}: {word.value}`" if word.value else f"`{word.setting}`" if word.ours else "–"
        rows.append(f"| `{name}` | {ours} | {word.note} |")
    return "\n".join(rows)


COMING = {"peft": PEFT, "trl": TRL, "axolotl": AXOLOTL, "llama_factory": LLAMA_FACTORY}


def coming_page(name: str) -> str:
    """How another program's user finds what they know."""
    page = (ROOT / "docs" / "coming" / f"{name}.md").read_text(encoding="utf-8")
    return filled(page, "names", names_table(COMING[name]))


def pages() -> dict[Path, str]:
    """Every generated file and its text."""
    every = rl.list_systems()
    works = [s for s in every if s.status == "works"]
    docs = ROOT / "docs"
    made = {docs / "methods" / f"{name}.md": method_page(name) for name in METHODS}
    index = "\n".join(f"- [`{name}`]({name}.md)" for name in METHODS)
    made[docs / "methods" / "index.md"] = (
        f"# Methods\n\nChoose by name; every page is generated from the code.\n\n{index}\n"
    )
    made[docs / "systems.md"] = (
        f"# Systems\n\n{len(works)} of {len(every)} systems work today; `planned` ones are not in the code yet.\n\n"
        + systems_table(every)
        + "\n"
    )
    made[docs / "settings.md"] = settings_page()
    made |= {docs / "coming" / f"{name}.md": coming_page(name) for name in COMING}
    made[ROOT / "src" / "rankloom" / "methods.json"] = method_table()
    made[docs / "reliability.md"] = reliability_page()
    summary = f"{len(works)} of {len(every)} systems work today ([all](docs/systems.md)):\n"
    rows = [f"| `{s.id}` | {s.name} | `{s.proof}` |" for s in works]
    working = "\n".join([summary, "| id | system | proven by |", "|---|---|---|", *rows])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made[ROOT / "README.md"] = filled(readme, "systems", working)
    made[docs / "performance.md"] = performance()
    measured = json.loads((ROOT / "bench" / "results" / "quantised.json").read_text(encoding="utf-8"))
    made[docs / "quantised.md"] = filled(
        (docs / "quantised.md").read_text(encoding="utf-8"), "quantised", quantised(measured)
    )
    made[docs / "index.md"] = made[ROOT / "README.md"].replace("](docs/", "](")
    return made


def main() -> int:
    stale = []
    for path, text in pages().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if "--check" not in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    print("\n".join(stale) if stale else "all generated pages are up to date")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    raise SystemExit(main())
