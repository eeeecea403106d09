"""One run as data: what YAML says, what the dataclasses hold, what `key=value` changes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rankloom.core.plan import Plan
from rankloom.core.settings import build, to_data
from rankloom.errors import SettingsError, suggest
from rankloom.registry import default_plan, plan_data, plan_from_data
from rankloom.train.settings import TrainSettings

Task = Literal["auto", "causal-lm", "masked-lm", "classification", "encoder"]
SHORT = {"model": "path", "data": "source"}
"""Sections that may be one string, and the setting that it stands for."""


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and how it is loaded.

    - `path`: a folder, a Hugging Face id, or `microworld` (the embedded base model).
    - `task`: `causal-lm`, `masked-lm` (BERT and its kin on running text), `classification`, `encoder` (hidden states,
      no head); `auto` follows the data and what the model's configuration says.
    - `head`: `keep` the classifier that the model's files have, with its class names and ids, or begin a `new` one for
      the classes of the data.
    - `dtype`: of the base weights; `auto` keeps what the file has, half precision on the CPU becomes float32.
    - `device`: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`; `revision`: branch, tag or commit of a hub model.
    - `trust_remote_code`: run Python code that comes with the model.
    """

    path: str
    task: Task = "auto"
    head: Literal["keep", "new"] = "keep"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DataSettings:
    """Which data, and how it becomes batches.

    - `source`: file, folder, `microworld:task#N`, or `owner/name` of a data set, or several of them with the ratios in
      which they are mixed, `{a.jsonl: 3, b.parquet: 1}`; `split`, `format`, `columns`, `labels`: as
      `rankloom.train.data.load` takes them.
    - `max_length` (None: 1024, or what the tokenizer's model takes), `train_on`, `template`, `unusable`: as
      `rankloom.train.data.prepare` takes them.
    - `cache`: the folder for tables of tokenised data, `off`, or `auto`: the user's cache folder for many records,
      where `rankloom[data]` is installed, else memory.
    - `batch_size`: rows per step and process; `packing`: several examples per row.
    - `epochs`: passes over the data, instead of `train.steps`.
    - `eval_source`, `eval_split`: what is evaluated; by default the `validation` split of a source that has one, else
      `hold_out` records taken from the training data (None: a tenth of them, at most 200).
    - `eval_examples`: most records evaluated; `eval_answers`: most conversations answered greedily for the exact match
      (None: all); `answer_tokens`: most tokens of such an answer.
    """

    source: str | Mapping[str, float]
    split: str = "train"
    format: str | None = None
    columns: Mapping[str, str] | None = None
    labels: tuple[str, ...] | None = None
    max_length: int | None = None
    train_on: Literal["assistant", "turns", "last", "all"] = "assistant"
    template: str = "auto"
    unusable: Literal["error", "drop"] = "error"
    cache: str = "auto"
    batch_size: int = 8
    packing: bool = False
    epochs: float | None = None
    eval_source: str | None = None
    eval_split: str | None = None
    hold_out: int | None = None
    eval_examples: int | None = 200
    eval_answers: int | None = 50
    answer_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length", "eval_examples", "answer_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)}: 1 or more")
        if (self.eval_answers or 0) < 0 or (self.hold_out is not None and self.hold_out < 1):
            raise SettingsError(f"eval_answers={self.eval_answers}, hold_out={self.hold_out}: must be positive")
        if self.hold_out is not None and (self.eval_source is not None or self.eval_split is not None):
            raise SettingsError("hold_out and eval_source/eval_split both say what is evaluated: give one of them")
        if self.epochs is not None and not (0 < self.epochs < math.inf):
            raise SettingsError(f"epochs={self.epochs}: a positive number")


@dataclass(frozen=True)
class RunConfig:
    """A whole run. `out`: the folder it writes; `seed`: of data order, starts and dropout; `name`: of the adapter."""

    model: ModelSettings | None = None
    data: DataSettings | None = None
    plan: Plan = field(default_factory=lambda: default_plan("lora"))
    train: TrainSettings = field(default_factory=TrainSettings)
    out: str | None = None
    seed: int = 0
    name: str = "default"

    def need_model(self) -> ModelSettings:
        """The model's settings, or an error that says how to give them."""
        if self.model is None:
            raise SettingsError("no model is given: model=FOLDER, model=OWNER/NAME, or model=microworld (embedded)")
        return self.model

    def need_data(self) -> DataSettings:
        """The data's settings, or an error that says how to give them."""
        if self.data is None:
            raise SettingsError("no data is given: data=FILE, data=OWNER/NAME, or data=microworld:list_rotate#1000")
        return self.data

    def need_out(self) -> str:
        """The folder to write, or an error that says how to give it."""
        if self.out is None:
            raise SettingsError("no folder to write is given: out=FOLDER")
        return self.out


def from_data(data: Mapping[str, Any]) -> RunConfig:
    """A run from plain data. `model` and `data` may be one string, `plan.method` a name. Raises `SettingsError`."""
    data = normal(data)
    known = [f.name for f in dataclasses.fields(RunConfig)]
    for key in data:
        if key not in known:
            raise SettingsError(
                f"the configuration has no setting {key!r}{_elsewhere(str(key)) or suggest(key, known)}"
            )
    train = dict(_mapping(data.get("train", {}), "train"))
    if "seed" in train:
        raise SettingsError("train.seed: the seed of a run stands at the top: seed=…")
    if "steps" in train and _mapping(data.get("data", {}), "data").get("epochs") is not None:
        raise SettingsError("train.steps and data.epochs say the same thing: give one of them")
    values: dict[str, Any] = {k: v for k, v in data.items() if k in ("out", "seed", "name")}
    plain = build(_Plain, values, "the configuration", _no_class)
    values["train"] = dataclasses.replace(build(TrainSettings, train, "train", _no_class), seed=plain.seed)
    for key, cls in (("model", ModelSettings), ("data", DataSettings)):
        if key in data:
            values[key] = build(cls, data[key], key, _no_class)
    if "plan" in data:
        values["plan"] = plan_from_data({"method": "lora", **_mapping(data["plan"], "plan")}, "plan")
    return RunConfig(**values)


def as_data(config: RunConfig) -> dict[str, Any]:
    """The run as plain data with every choice written out; `from_data` gives the same run back."""
    found: dict[str, Any] = {}
    for key in SHORT:
        section = getattr(config, key)
        if section is not None:
            found[key] = _all(section)
    found["plan"] = plan_data(config.plan)
    found["train"] = {k: v for k, v in _all(config.train).items() if k != "seed"}
    if config.data is not None and config.data.epochs is not None:
        del found["train"]["steps"]
    return {**found, "out": config.out, "seed": config.seed, "name": config.name}


def normal(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same data with its short forms spelled out."""
    found = dict(data)
    for key, setting in SHORT.items():
        if isinstance(found.get(key), str):
            found[key] = {setting: found[key]}
        elif key in found and found[key] is None:
            del found[key]
    if isinstance(found.get("plan"), Mapping):
        plan = dict(found["plan"])
        plan["method"] = method_data(plan.get("method", "lora"))
        found["plan"] = plan
    return found


def method_data(data: Any) -> Any:
    """A method by name, spelled out."""
    return {"name": data} if isinstance(data, str) else data


@dataclass(frozen=True)
class _Plain:
    out: str | None = None
    seed: int = 0
    name: str = "default"


def _all(section: Any) -> dict[str, Any]:
    return {f.name: to_data(getattr(section, f.name), lambda cls: None) for f in dataclasses.fields(section)}


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SettingsError(f"{where}: expected a mapping of settings, got {value!r}")
    return value


def _elsewhere(key: str) -> str:
    sections = {"model": ModelSettings, "data": DataSettings, "plan": Plan, "train": TrainSettings}
    found = [f"{s}.{key}" for s, cls in sections.items() if any(f.name == key for f in dataclasses.fields(cls))]
    return f"; it is {' or '.join(found)}" if found else ""


def _no_class(base: type, name: str) -> type | None:
    return None
