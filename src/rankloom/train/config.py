"""One run as data: what YAML says, what the dataclasses hold, what `key=value` changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from rankloom.core.plan import Plan, default_plan
from rankloom.errors import SettingsError
from rankloom.registry import kinds_with
from rankloom.settings import Count, Positive, Seed, Settings, Steps, to_data
from rankloom.settings import from_data as build
from rankloom.settings.changes import Path, Spot, ends, spots
from rankloom.settings.engine import UnknownSetting
from rankloom.settings.reference import Field, describe, find, reference
from rankloom.train.elsewhere import ELSEWHERE, Word
from rankloom.train.settings import TrainSettings

Task = Literal["auto", "causal-lm", "masked-lm", "classification", "encoder"]


@dataclass(frozen=True)
class ModelSettings(Settings):
    """Which model, and how it is loaded.

    - `path`: a folder, a Hugging Face id, or `microworld` (the embedded base model).
    - `task`: `causal-lm`, `masked-lm` (BERT and its kin on running text), `classification`, `encoder` (hidden states,
      no head); `auto` follows the data and what the model's configuration says.
    - `head`: `keep` the classifier that the model's files have, with its class names and ids, or begin a `new` one for
      the classes of the data.
    - `dtype`: of the base weights; `auto` keeps what the file has, half precision on the CPU becomes float32.
    - `device`: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`; `revision`: branch, tag or commit of a hub model.
    - `trust_remote_code`: run Python code that comes with the model; said in the command, for no file turns it on.
    """

    short: ClassVar[str] = "path"

    path: str
    task: Task = "auto"
    head: Literal["keep", "new"] = "keep"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DataSettings(Settings):
    """Which data, and how it becomes batches.

    - `source`: file, folder, `microworld:task#N`, or `owner/name` of a data set, or several of them with the ratios in
      which they are mixed, `{a.jsonl: 3, b.parquet: 1}`; `split`: of such a set; `format`, `columns`, `labels`: of the
      records, where they are not found, as `rankloom.train.data.load` takes them.
    - `max_length`: tokens kept of an example (None: 1024, or what the tokenizer's model takes); `train_on`: the answers
      of the assistant, one example for each of them ("turns"), the last one, or all tokens; `template`: of a chat,
      `auto` being the tokenizer's; `unusable`: whether an example without a token to train stops the run or is dropped.
    - `cache`: the folder for tables of tokenised data, `off`, or `auto`: the user's cache folder for many records,
      where `rankloom[data]` is installed, else memory.
    - `batch_size`: rows per step and process; `packing`: several examples per row.
    - `epochs`: passes over the data, instead of `train.steps`.
    - `eval_source`, `eval_split`: what is evaluated; by default the `validation` split of a source that has one, else
      records held out. `hold_out`: records taken from the training data (None: a tenth of them, at most 200).
    - `eval_examples`: most records evaluated; `eval_answers`: most conversations answered greedily for the exact match
      (None: all); `answer_tokens`: most tokens of such an answer.
    """

    short: ClassVar[str] = "source"

    source: str | Mapping[str, float]
    split: str = "train"
    format: str | None = None
    columns: Mapping[str, str] | None = None
    labels: tuple[str, ...] | None = None
    max_length: Count | None = None
    train_on: Literal["assistant", "turns", "last", "all"] = "assistant"
    template: str = "auto"
    unusable: Literal["error", "drop"] = "error"
    cache: str = "auto"
    batch_size: Count = 8
    packing: bool = False
    epochs: Positive | None = None
    eval_source: str | None = None
    eval_split: str | None = None
    hold_out: Count | None = None
    eval_examples: Count | None = 200
    eval_answers: Steps | None = 50
    answer_tokens: Count = 128

    def __post_init__(self) -> None:
        if self.hold_out is not None and (self.eval_source is not None or self.eval_split is not None):
            raise SettingsError("hold_out and eval_source/eval_split both say what is evaluated: give one of them")


@dataclass(frozen=True)
class RunConfig(Settings):
    """A whole run. `out`: the folder it writes; `seed`: of data order, starts and dropout; `name`: of the adapter."""

    model: ModelSettings | None = None
    data: DataSettings | None = None
    plan: Plan = field(default_factory=lambda: default_plan("lora"))
    train: TrainSettings = field(default_factory=TrainSettings)
    out: str | None = None
    seed: Seed = 0
    name: str = "default"

    def __post_init__(self) -> None:
        if self.train.seed != self.seed:
            object.__setattr__(self, "train", replace(self.train, seed=self.seed))

    @classmethod
    def spelled(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """With the method that a plan has by default. Refuses a length given twice, and a seed below the top."""
        plan, train, records = ({} if data.get(key) is None else data[key] for key in ("plan", "train", "data"))
        if isinstance(train, Mapping) and "seed" in train:
            raise SettingsError("train.seed: the seed of a run stands at the top: seed=…", "train.seed")
        long = isinstance(records, Mapping) and records.get("epochs") is not None
        if long and isinstance(train, Mapping) and "steps" in train:
            raise SettingsError("train.steps and data.epochs say the same thing: give one of them", "train.steps")
        return {**data, "plan": {"method": "lora", **plan}} if isinstance(plan, Mapping) else data

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
    """A run from plain data. `model` and `data` may be one text, `plan.method` a name. Raises `SettingsError`."""
    try:
        config: RunConfig = build(RunConfig, data)
    except UnknownSetting as error:
        better = _better(error.key, error.value, {spot.path: spot for spot in spots(RunConfig, data)})
        if not better:
            raise
        said = str(error).partition(";")[0]
        raise SettingsError(f"{said}{better}", error.path) from error
    return config


def _better(key: str, value: Any, there: Mapping[Path, Spot]) -> str:
    """The end of an error about a key that stands at the wrong place, or that is another program's; "" for neither."""
    word = Word(key) if ends((key,), there) else ELSEWHERE.get(key)
    if word is None:
        return ""
    return word.as_key(str(value), [".".join(spot.path) for spot in ends(tuple(word.setting.split(".")), there)])


def as_data(config: RunConfig) -> dict[str, Any]:
    """The run as plain data with every choice written out; `from_data` gives the same run back."""
    found = dict(to_data(config, full=True))
    del found["train"]["seed"]
    if config.data is not None and config.data.epochs is not None:
        del found["train"]["steps"]
    return {key: value for key, value in found.items() if value is not None or key == "out"}


def settings_table(key: str | None = None) -> list[Field]:
    """The settings of a run; with `key` those at or below that path, or those of the parts registered by that name."""
    fields = [f for f in reference(RunConfig) if f.name != "train.seed"]
    if key is None:
        return fields
    parts = kinds_with(key)
    if not parts:
        return find(fields, key)
    return [
        replace(f, name=f"{kind} {key}.{f.name}") for kind, (base, made) in parts.items() for f in describe(made, base)
    ]
