"""What a path on the command line means: the folder of a run, an adapter or a model, or a configuration file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rankloom.errors import FileError, SettingsError, suggest
from rankloom.hf.folder import LAST as MODEL
from rankloom.jobs.runs import ADAPTER, CONFIG
from rankloom.train.config import RunConfig
from rankloom.train.configfile import read_config

ADAPTER_CONFIG = "adapter_config.json"
KNOWN_CACHES = ("auto", "off")
"""Values of `data.cache` that are no folder."""


@dataclass(frozen=True)
class Opened:
    """A configuration with the adapter that goes with it, if there is one."""

    config: RunConfig
    adapter: Path | None

    def need_adapter(self) -> Path:
        """The adapter's folder, or an error that says how to give it."""
        if self.adapter is None:
            raise SettingsError("no adapter is given: name a run's folder, or an adapter's folder")
        return self.adapter


def open_path(path: Path | None, changes: Sequence[str] = ()) -> Opened:
    """The configuration and adapter that `path` means, with changes `key=value` applied.

    A run's folder has both, and is the one that the run writes to, wherever it has been moved. An adapter's folder
    names its base model itself; `model=` comes before that. A model's folder, as merge and quantize write it, is the
    model, with the adapter in it if there is one.
    """
    if path is None:
        return Opened(read_config(None, changes), None)
    if (path / CONFIG).is_file():
        adapter = path / ADAPTER
        return Opened(_of_run(path, changes), adapter if adapter.is_dir() else None)
    if (path / ADAPTER_CONFIG).is_file():
        beside = _run_around(path)
        return Opened(_of_run(beside, changes) if beside is not None else _of_adapter(path, changes), path)
    if (path / MODEL).is_file():
        adapter = path / ADAPTER
        config = read_config(None, [f"model.path={json.dumps(str(path))}", *changes])
        return Opened(config, adapter if (adapter / ADAPTER_CONFIG).is_file() else None)
    if path.is_dir():
        there = ", ".join(sorted(x.name for x in path.iterdir())[:8]) or "nothing"
        raise FileError(
            f"{path}: not the folder of a run ({CONFIG}), an adapter ({ADAPTER_CONFIG}) or a model ({MODEL}); "
            f"there is {there}"
        )
    if path.exists() and path.suffix not in (".yaml", ".yml"):
        raise FileError(
            f"{path}: a {path.suffix or 'nameless'} file; name the folder of a run, adapter or model, or a YAML file"
        )
    if not path.exists() and not path.suffix:
        near = [x.name for x in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileError(f"{path}: no such file or folder{suggest(path.name, near)}")
    return Opened(read_config(path, changes), None)


def _of_run(run: Path, changes: Sequence[str]) -> RunConfig:
    """The configuration of a run's folder, maybe a stranger's: where it writes is here, or said in the command."""
    config = read_config(run / CONFIG, changes)
    cache = config.data.cache if config.data is not None else "off"
    if cache not in KNOWN_CACHES and not _says("data.cache", changes):
        raise SettingsError(
            f"{run / CONFIG}: data.cache={cache!r} is a folder to write to, which no run's folder may decide: add "
            f"cache=auto to the command, or {f'cache={cache}'!r} if it is yours"
        )
    return config if _says("out", changes) else dataclasses.replace(config, out=str(run))


def _says(setting: str, changes: Sequence[str]) -> bool:
    """Whether one of the changes names this setting, by its path or its end."""
    return any(change.partition("=")[0].strip() in (setting, setting.rpartition(".")[2]) for change in changes)


def _run_around(adapter: Path) -> Path | None:
    """The run that the adapter still lies in."""
    found = adapter.absolute().parent
    return found if adapter.name == ADAPTER and (found / CONFIG).is_file() else None


def _of_adapter(adapter: Path, changes: Sequence[str]) -> RunConfig:
    """The configuration of an adapter alone, on the base model that it names, unless one is given."""
    if _says("model.path", changes) or _says("model", changes):
        return read_config(None, changes)
    from rankloom.formats.manifest import read_config as read_adapter_config

    base = read_adapter_config(adapter).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise SettingsError(f"{adapter} does not name its base model: give model=FOLDER or model=OWNER/NAME")
    return read_config(None, [f"model={json.dumps(base)}", *changes])
