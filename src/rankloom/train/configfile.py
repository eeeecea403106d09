"""A run from a YAML file and `key=value` changes; every refusal names the line or the argument that it comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankloom.errors import FileError, SettingsError, suggest
from rankloom.files.reading import plain_file
from rankloom.settings import yamltext
from rankloom.settings.changes import Origins, changed, ends, spots
from rankloom.train.config import RunConfig, as_data, from_data
from rankloom.train.elsewhere import ELSEWHERE

LONGEST = 4 * yamltext.LONGEST
"""Bytes of a file that is opened."""
CODE = "trust_remote_code"
"""The setting of a model that runs what comes with it: said in the command, never by a file."""


def read_config(file: Path | None, changes: Sequence[str] = ()) -> RunConfig:
    """The run of a YAML file (None: all defaults) with changes `path=value`, or `leaf=value` where the leaf is unique.

    Raises `FileError` for a file that cannot be read, `SettingsError` for what it says; both name file and line.
    """
    return config_of(_text(file) if file is not None else "", str(file or ""), changes)


def config_of(text: str, where: str, changes: Sequence[str] = ()) -> RunConfig:
    """The run of a YAML text, `where` being its name in errors, with changes; `CODE` is taken from these alone."""
    data, lines = yamltext.parse(text, where)
    if not isinstance(data, dict | None):
        raise SettingsError(f"{where}: expected settings 'key: value', got {str(data)[:80]!r}")
    origins = {path: f"{where}, line {line}" for path, line in lines.items()}
    said = origins.get(f"model.{CODE}", where)
    data, asks = _without_code(data or {})
    data = changed(RunConfig, data, changes, origins, foreign)
    if asks and CODE not in _model_of(data):
        raise SettingsError(
            f"{said}: asks for Python code of its model to be run, which no file "
            f"may decide: add {CODE}=true to the command if you trust it, else {CODE}=false",
            f"model.{CODE}",
        )
    try:
        return from_data(data)
    except SettingsError as error:
        origin = _origin(error.path, origins) or ("" if changes else where)
        raise SettingsError(f"{origin}: {error}" if origin else str(error), error.path) from error


def dump(config: RunConfig) -> str:
    """The run as YAML that `read_config` takes."""
    return yamltext.dump(as_data(config))


def _without_code(data: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The data without `CODE`, and whether they ask for it."""
    model = _model_of(data)
    if CODE not in model:
        return dict(data), False
    kept = {key: value for key, value in model.items() if key != CODE}
    return {**data, "model": kept}, model[CODE] is not False


def _model_of(data: Mapping[str, Any]) -> Mapping[str, Any]:
    model = data.get("model")
    return model if isinstance(model, Mapping) else {}


def foreign(name: str, value: str) -> str:
    """What is said of an argument with another program's name; "" where none is known by it."""
    word = ELSEWHERE.get(name)
    return "" if word is None else word.as_argument(value)


def is_setting(key: str) -> bool:
    """Whether a run, as it is by default, has a setting of this path or with this end."""
    return bool(ends(tuple(key.split(".")), {spot.path: spot for spot in spots(RunConfig, {})}))


def _text(file: Path) -> str:
    try:
        return plain_file(file, LONGEST).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    except FileError as error:
        if file.exists() or not file.parent.is_dir():
            raise
        raise FileError(f"{error}{suggest(file.name, [x.name for x in file.parent.glob('*.y*ml')])}") from error


def _origin(path: str, origins: Origins) -> str:
    """Where the setting at `path`, or what holds it, was given."""
    while path and path not in origins:
        path = re.sub(r"(^|\.)[^.\[]*$|\[\d+\]$", "", path)
    return origins.get(path, "")
