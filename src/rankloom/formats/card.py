"""The README.md of an adapter folder: a model card with YAML front matter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rankloom.errors import SettingsError, one_line, printable, suggest
from rankloom.settings import yamltext

FIELDS = frozenset(
    {"data", "description", "intended_use", "language", "license", "metrics", "settings", "tags", "title"}
)
MARKS = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)")
FIRST = re.compile(r"^(\d*)([#>]|[-+.)](?=\s|$))")
"""What means something in a line of Markdown, and at its beginning."""
TICKS = re.compile("`+")


def render(card: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Markdown of a card.

    `about`: what saving knows (base, library, method, settings, compat, versions, parameters, tensors). `card`: what
    the user adds: title, description, data, metrics (name → number, or {"before": …, "after": …}), settings, tags,
    language, license (default "unknown"), intended_use. Raises `SettingsError` for another key.
    """
    for key in card:
        if key not in FIELDS:
            raise SettingsError(f"card has no field {key!r}{suggest(key, FIELDS)}")
    front = {
        "base_model": about["base"],
        "library_name": about["library"],
        "license": card.get("license", "unknown"),
        "language": card.get("language"),
        "tags": [*dict.fromkeys([*about["tags"], *card.get("tags", ())])],
    }
    kept = {k: v for k, v in front.items() if v}
    head = yamltext.dump(kept)
    return f"---\n{head}---\n\n" + "\n".join(_body(card, about)).rstrip() + "\n"


def _body(card: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    lines = [f"# {said(card.get('title', about['name']))}", ""]
    lines += [printable(card.get("description", f"A {about['method']} adapter for {_base(about['base'])}.")), ""]
    lines += [
        "## Method",
        "",
        f"`{about['method']}`, {about['parameters']:,} parameters in {about['tensors']} tensors.",
        "",
    ]
    lines += ["```json", json.dumps(about["settings"], indent=2), "```", ""]
    if card.get("settings"):
        lines += ["## Training", "", *_table(("setting", "value"), card["settings"]), ""]
    if card.get("data"):
        lines += ["## Data", "", *_bullets(card["data"]), ""]
    if card.get("metrics"):
        lines += ["## Results", "", *_results(card["metrics"]), ""]
    if card.get("intended_use"):
        lines += ["## Intended use", "", printable(str(card["intended_use"])), ""]
    lines += ["## Load it", "", "```python", *about["usage"], "```", "", said(about["compat"]), ""]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return [*lines, "## Versions", "", versions]


def said(value: Any) -> str:
    """Any value as one line of Markdown that shows it: nothing in it is a heading, a link, code or HTML."""
    text = MARKS.sub(r"\\\g<0>", one_line(str(value)))
    return FIRST.sub(r"\1\\\2", text).replace("&", "&amp;").replace("<", "&lt;")


def _base(name: str | None) -> str:
    return _code(name) if name else "a base model that does not know its own name"


def _code(text: str) -> str:
    """A text as a span of code, in more backticks than it has."""
    line = one_line(text)
    fence = "`" * (1 + max(map(len, TICKS.findall(line)), default=0))
    return f"{fence} {line} {fence}" if line.startswith("`") or line.endswith("`") else f"{fence}{line}{fence}"


def _bullets(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [f"- {said(k)}: {said(v)}" for k, v in value.items()]
    return [f"- {said(v)}" for v in value] if isinstance(value, (list, tuple)) else [said(value)]


def _table(head: tuple[str, ...], rows: Mapping[str, Any]) -> list[str]:
    return [_row(head), _rule(head), *(_row((k, v)) for k, v in rows.items())]


def _results(metrics: Mapping[str, Any]) -> list[str]:
    if not any(isinstance(v, Mapping) for v in metrics.values()):
        return _table(("metric", "value"), metrics)
    columns = [*dict.fromkeys(c for v in metrics.values() if isinstance(v, Mapping) for c in v)]
    head = ("metric", *columns)
    cells = {k: v if isinstance(v, Mapping) else {columns[-1]: v} for k, v in metrics.items()}
    return [
        _row(head),
        _rule(head),
        *(_row((k, *(v.get(c, "") for c in columns))) for k, v in cells.items()),
    ]


def _row(cells: tuple[Any, ...]) -> str:
    return "| " + " | ".join(map(said, cells)) + " |"


def _rule(head: tuple[Any, ...]) -> str:
    return "| " + " | ".join("---" for _ in head) + " |"
