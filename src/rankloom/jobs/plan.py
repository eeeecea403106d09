"""What a run would do, without doing it: places hit and missed, counts, memory, file size and conflicts.

The model is built on the meta device, so a large one costs no memory. The activations are measured, not guessed: the
training forward is traced on tensors without values, and the tensors that autograd keeps are added up.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.attach import attach
from rankloom.core.bank import Bank
from rankloom.core.fuse import memo_of
from rankloom.core.kinds import kind_of
from rankloom.core.plan import Plan
from rankloom.core.prepare import kept_layers
from rankloom.core.site import LAYER, Site
from rankloom.core.targets import base_modules
from rankloom.errors import NotMergeable, RankloomError
from rankloom.hf.models import known_head, load_tokenizer, skeleton, task_of, with_heads
from rankloom.jobs.fake import without_values
from rankloom.jobs.notes import plan_notes
from rankloom.jobs.rundata import LENGTH, prepared, read_records
from rankloom.ops.kept import kept_bytes
from rankloom.registry import name_of
from rankloom.store.base import Packed
from rankloom.store.footprint import Kept, footprint
from rankloom.store.model import frozen
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform
from rankloom.train.config import RunConfig
from rankloom.train.data import preview
from rankloom.train.optim import build_groups, build_optimizer
from rankloom.train.ruleset import RuleSet
from rankloom.train.run import TrainRun, only_these_train

FORMULA = "every distinct tensor that autograd keeps after one training forward, weights aside; traced without values"
CHECKPOINTED = "blocks · batch · length · width, plus one block recomputed at a time"


@dataclass(frozen=True)
class PlannedSite:
    """One adapted place: dotted name, kind of layer, (…, out, in), tensors' elements that train there."""

    name: str
    kind: str
    shape: tuple[int, ...]
    trainable: int


@dataclass(frozen=True)
class Memory:
    """Bytes during training. `activations`: None where the model cannot be traced; `rows`, `length`: of the batch."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int | None
    rows: int
    length: int
    formula: str

    @property
    def total(self) -> int:
        """All together; at least that, where the activations are not known."""
        return self.weights + self.adapters + self.gradients + self.optimizer + (self.activations or 0)


@dataclass(frozen=True)
class StoreCost:
    """What the base would take if its linear weights were kept in `store`: `bytes` of all weights."""

    store: str
    bits_per_weight: float
    bytes: int


@dataclass(frozen=True)
class PlanReport:
    """What `plan_job` finds out.

    `sites`: places hit; `missed`: linear layers that stay as they are, `stacked`: experts that do, all in one
    parameter; `whole`: tensors trained whole; `mergeable`:
    whether the change has one matrix; `file`: bytes of the adapter's tensors; `weights`: the base's, by how they are
    kept; `stores`: what the base would take in other stores; `conflicts`: what would stop the run.
    """

    model: str
    task: str
    method: str
    rules: tuple[str, ...]
    sites: tuple[PlannedSite, ...]
    missed: tuple[str, ...]
    stacked: tuple[str, ...]
    whole: tuple[str, ...]
    trainable: int
    total: int
    mergeable: bool
    file: int
    memory: Memory
    weights: tuple[Kept, ...]
    stores: tuple[StoreCost, ...]
    conflicts: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON takes them."""
        data = asdict(self)
        data["memory"]["total"] = self.memory.total
        data["percent"] = 100 * self.trainable / self.total
        return data


@dataclass(frozen=True)
class SiteGroup:
    """Places with one name but for the block's number (`layers.*.q_proj`), one kind and one shape."""

    pattern: str
    kind: str
    shape: tuple[int, ...]
    count: int
    trainable: int


@dataclass(frozen=True)
class Planned:
    """The report with what the data says: `stages` are (what, text) for people."""

    report: PlanReport
    stages: tuple[tuple[str, str], ...]

    @property
    def groups(self) -> tuple[SiteGroup, ...]:
        """The places, blocks put together."""
        found: dict[tuple[str, str, tuple[int, ...], int], int] = {}
        for site in self.report.sites:
            key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", site.name), site.kind, site.shape, site.trainable)
            found[key] = found.get(key, 0) + 1
        return tuple(SiteGroup(p, k, s, n, t) for (p, k, s, t), n in found.items())

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**self.report.as_dict(), **dict(self.stages)}


def plan_run(config: RunConfig) -> Planned:
    """The dry run of `config`, with its data looked at where there is some. Raises as `plan_job`, and `DataError`."""
    if config.data is None:
        return Planned(plan_job(config), ())
    records = read_records(config.data, config.seed, known_head(config.need_model()))
    tokenizer = load_tokenizer(config.need_model())
    train = prepared(records.train, tokenizer, config.data, task_of(config.need_model(), records.form))
    summary = train.summary()
    stages = (
        ("data", f"{summary}\nevaluation: {records.note}"),
        ("preview", preview(train[0], tokenizer, labels=train.labels)),
    )
    length = train.max_length if config.data.packing else min(-(-summary.longest // 8) * 8, train.max_length)
    return Planned(plan_job(config, records.form, records.labels, length), stages)


def plan_job(config: RunConfig, form: str | None = None, labels: tuple[str, ...] = (), length: int = 0) -> PlanReport:
    """The dry run of `config`.

    Args:
        config: the run; its data may be missing.
        form, labels: format and class names of the data, where they are known.
        length: tokens of a row; 0: `data.max_length`, at most what the model takes.

    Raises:
        FileError, SettingsError, TargetError: model and plan do not fit together at all.
    """
    loaded = skeleton(config.need_model(), form, labels)
    model = loaded.model
    plan = with_heads(config.plan, loaded.heads)
    total = sum(p.numel() for p in model.parameters())
    stores = by_store(model, plan)
    bank = attach(model, plan, config.name)
    tensors = list({id(t): t for _, t, _ in bank.tensors(config.name)}.values())
    weights = footprint(module for _, module in base_modules(model)).rows
    trained = [t for t in tensors if t.requires_grad]
    conflicts, rules = _conflicts(model, config)
    mergeable, why = merges(bank.sites(config.name))
    notes = [f"{', '.join(loaded.heads)} starts at random and is trained whole"] if loaded.heads else []
    notes += [why] if why else []
    notes += plan_notes(plan, model)
    site = bank.sites(config.name)
    sites, missed = tuple(_sites(bank, config.name)), tuple(_missed(model, bank, config.name))
    rows = config.data.batch_size if config.data is not None else 1
    length = length or _length(model, config)
    activations, trouble = _activations(model, config, loaded.task, rows, length)
    notes += [f"the activations cannot be traced: {trouble}"] if trouble else []
    notes += [] if trouble else _paths(bank, config.name, config.train.gradient_checkpointing)
    stacked = tuple(_stacked(model, bank, config.name))
    notes += _left_out(model, stacked)
    return PlanReport(
        model=config.need_model().path,
        task=loaded.task,
        method=_method_name(plan),
        rules=rules,
        sites=sites,
        missed=missed,
        stacked=stacked,
        whole=tuple(f.name for f in site if f.adapter.whole() is not None),
        trainable=sum(t.numel() for t in trained),
        total=total + sum(t.numel() for t in tensors),
        mergeable=mergeable,
        file=_bytes(tensors),
        memory=Memory(
            weights=sum(kept.bytes for kept in weights),
            adapters=_bytes(tensors),
            gradients=_bytes(trained),
            optimizer=2 * _bytes(trained),
            activations=activations,
            rows=rows,
            length=length,
            formula=CHECKPOINTED if config.train.gradient_checkpointing else FORMULA,
        ),
        weights=weights,
        stores=stores,
        conflicts=conflicts,
        notes=tuple(notes),
    )


def by_store(model: nn.Module, plan: Plan) -> tuple[StoreCost, ...]:
    """The bytes of a model's weights in the usual stores, what the plan keeps dense kept dense."""
    wanted = replace(plan, store=NormalFloat(), start=None)
    linear = [frozen(layer, "weight") for layer in kept_layers(model, wanted).values()]
    if any(isinstance(weight, Packed) for weight in linear):
        return ()
    numbers = sum(weight.numel() for weight in linear)
    rest = _bytes(model.parameters()) - _bytes(linear)
    return tuple(
        StoreCost(str(store), bits, rest + round(numbers * bits / 8))
        for store in (NormalFloat(4), NormalFloat(3), NormalFloat(2), Uniform(8), Uniform(4), Uniform(3), Uniform(2))
        for bits in [store.bits_per_weight()]
    )


def _sites(bank: Bank, name: str) -> Iterator[PlannedSite]:
    for site in bank.sites(name):
        if site.adapter.whole() is None:
            count = sum(p.numel() for p in site.adapter.parameters() if p.requires_grad)
            yield PlannedSite(site.name, site.kind.name, site.shape, count)


def _missed(model: nn.Module, bank: Bank, name: str) -> Iterator[str]:
    hit = {id(f.layer) for f in bank.sites(name)}
    for path, module in base_modules(model):
        kind = kind_of(module)
        if kind is not None and kind.linear and id(module) not in hit:
            yield path


def _stacked(model: nn.Module, bank: Bank, name: str) -> Iterator[str]:
    """Experts in one parameter (E, out, in) that nothing adapts."""
    hit = {site.name for site in bank.sites(name)}
    for path, module in base_modules(model):
        for leaf, value in module._parameters.items():
            where = f"{path}.{leaf}" if path else leaf
            if value is not None and value.ndim == 3 and kind_of(module) is None and where not in hit:
                yield where


def _left_out(model: nn.Module, stacked: tuple[str, ...]) -> list[str]:
    """What part of the weights stacked experts are, and how they are reached."""
    if not stacked:
        return []
    experts = sum(model.get_parameter(name).numel() for name in stacked)
    share = experts / sum(p.numel() for p in dict.fromkeys(model.parameters()))
    leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in stacked))
    return [
        f"{share:.0%} of the weights are experts in {len(stacked)} stacked parameters, which are not adapted: "
        f"target_parameters=[{leaves}] adapts them"
    ]


def _conflicts(model: nn.Module, config: RunConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the rules refuse at the start of such a run, and the rules' names."""
    with only_these_train(model) as parameters:
        run = TrainRun(model, config.train.steps, parameters)
        try:
            rules = RuleSet(run.bank)
            run.optimizer = build_optimizer(build_groups(run, rules, config.train), config.train)
            rules.start(run)
        except RankloomError as error:
            return (str(error),), ()
    return (), tuple(name_of(type(rule)) or type(rule).__name__ for rule in rules.each)


def merges(sites: Iterable[Site]) -> tuple[bool, str]:
    """Whether the change has a matrix at each of these sites, and why not."""
    try:
        for site in sites:
            site.adapter.delta(site.base)
    except NotMergeable as error:
        return False, f"not mergeable: {error}"
    return True, ""


def _length(model: Any, config: RunConfig) -> int:
    most = getattr(model.config, "max_position_embeddings", None)
    wanted = config.data.max_length or LENGTH if config.data is not None else LENGTH
    return min(wanted, int(most)) if most else wanted


def _activations(model: Any, config: RunConfig, task: str, rows: int, length: int) -> tuple[int | None, str]:
    """(bytes, "") or (None, the reason)."""
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)
    try:
        with without_values():
            model.to_empty(device="cpu").train()
            ids = torch.zeros(rows, length, dtype=torch.long)
            labels = {
                "causal-lm": {"labels": ids},
                "classification": {"labels": torch.zeros(rows, dtype=torch.long)},
            }.get(task, {})
            with torch.autocast("cpu", autocast) if autocast is not None else nullcontext():
                kept = saved_bytes(model, {"input_ids": ids, **labels})
    except Exception as error:  # any model code may run here; the plan stands without this figure
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    blocks, width = getattr(model.config, "num_hidden_layers", 0), getattr(model.config, "hidden_size", 0)
    if config.train.gradient_checkpointing and blocks and width:
        size = 2 if autocast is not None else model.dtype.itemsize
        kept = blocks * rows * length * width * size + kept // blocks
    return kept, ""


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes of the tensors that autograd keeps after one forward of `model`, its parameters not counted."""
    out = model(**batch)
    values = out.values() if isinstance(out, dict) else (out,)
    return kept_bytes([v for v in values if isinstance(v, Tensor)], model.parameters())


def _paths(bank: Bank, name: str, checkpointing: bool) -> list[str]:
    """Which layers the traced forward computed fused and which together; which took the plain path, and why."""
    layers = [f.layer for f in bank.sites(name) if f.slot == LAYER]
    memos = [memo_of(layer) for layer in layers]
    if not any(memo.plain is not None for memo in memos):
        return []
    leaf = {id(f.layer): f.name.rsplit(".", 1)[-1] for f in bank.sites(name)}
    groups = Counter(
        f"({', '.join(leaf[id(f)] for f in m.fellows)})" for layer, m in zip(layers, memos) if m.fellows[:1] == (layer,)
    )
    together = "none, for gradient checkpointing" if checkpointing else _counted(groups)
    fused = [m for m in memos if m.plain == ""]
    notes = [
        f"fused in training: {len(fused)} of {len(layers)} layers"
        + (f", together {together}" if fused and together else "")
    ]
    plain = Counter(m.plain for m in memos if m.plain)
    return notes + [f"not fused, so slower: {_counted(plain)}"] * bool(plain)


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{n} × {text}" for text, n in found.items())


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _method_name(plan: Plan) -> str:
    names = []
    method = plan.method
    while True:
        names.append(name_of(type(method)) or type(method).__name__)
        inner = method.inner_methods()
        if not inner:
            return "(".join(names) + ")" * (len(names) - 1)
        method = inner[0]
