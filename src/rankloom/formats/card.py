"""The README.md of an adapter folder: a model card with YAML front matter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rankloom.errors import SettingsError, suggest
from rankloom.settings import yamltext

FIELDS = frozenset(
    {"data", "description", "intended_use", "language", "license", "metrics", "settings", "tags", "title"}
)


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
    lines = [f"# {card.get('title', about['name'])}", ""]
    lines += [card.get("description", f"A {about['method']} adapter for {_base(about['base'])}."), ""]
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
        lines += ["## Intended use", "", str(card["intended_use"]), ""]
    lines += ["## Load it", "", "```python", *about["usage"], "```", "", f"{about['compat']}", ""]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return [*lines, "## Versions", "", versions]


def _base(name: str | None) -> str:
    return f"`{name}`" if name else "a base model that does not know its own name"


def _bullets(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [f"- {k}: {v}" for k, v in value.items()]
    return [f"- {v}" for v in value] if isinstance(value, (list, tuple)) else [str(value)]


def _table(head: tuple[str, ...], rows: Mapping[str, Any]) -> list[str]:
    return [_row(head), _row(("---",) * len(head)), *(_row((k, v)) for k, v in rows.items())]


def _results(metrics: Mapping[str, Any]) -> list[str]:
    if not any(isinstance(v, Mapping) for v in metrics.values()):
        return _table(("metric", "value"), metrics)
    columns = [*dict.fromkeys(c for v in metrics.values() if isinstance(v, Mapping) for c in v)]
    head = ("metric", *columns)
    cells = {k: v if isinstance(v, Mapping) else {columns[-1]: v} for k, v in metrics.items()}
    return [
        _row(head),
        _row(("---",) * len(head)),
        *(_row((k, *(v.get(c, "") for c in columns))) for k, v in cells.items()),
    ]


def _row(cells: tuple[Any, ...]) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"
