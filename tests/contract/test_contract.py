"""Every registered method, preset and a choice of combinations keeps every promise of the contract."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_models import (
    IMAGES,
    POINTS,
    TEXTS,
    WORDS,
    block_model,
    call,
    conv_net,
    llama,
    logits,
    pair,
)

import rankloom as rl
from rankloom import registry
from rankloom.core.adapter import Adapter, borrowed, fixed_thin
from rankloom.core.plan import Plan, as_plan, default_plan
from rankloom.gates.constant import Constant
from rankloom.gates.linear import Linear
from rankloom.gates.task import Task
from rankloom.gates.topk import TopK
from rankloom.testing import NAMES, Check, checks
from rankloom.testing.learning import Penalty

TARGETS = ["q_proj", "up_proj", "down_proj"]
SMALL: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 6, "target_r": 4},
    "asymmetric_lora": {"r": 4},
    "bilora": {"r": 4, "hypergrad": "none", "gamma1": 1e-4},
    "dylora": {"r": 4},
    "loftq": {"r": 4},
    "hira": {"r": 4},
    "llava_mole": {"r": 2, "lora_alpha": 4.0, "lora_dropout": 0.0},
    "loha": {"r": 4},
    "lokr": {"r": 1, "decompose_factor": 4, "rank_dropout": 0.2},
    "loramoe": {"r": 2, "n": 2},
    "lq_lora": {"r": 4},
    "lqer": {"r": 4},
    "melora": {"r": 2},
    "mixture": {"n": 2},
    "moelora_task": {"r": 4, "n": 2, "task_embedding_dim": 4, "unknown": 1},
    "molora": {"r": 2, "n": 3},
    "mov": {"n": 3},
    "nola": {"r": 4, "num_basis_A": 24, "num_basis_B": 24, "lora_alpha": 16.0},
    "qa_lora": {"r": 4, "group_size": 2},
    "qdylora": {"r": 4},
    "qlora": {"r": 4},
    "tied_lora": {"r": 4},
    "unrolled_lora": {"r": 2},
    "vera": {"r": 32},
}
ON_OTHERS = {"blend", "lora_flow", "xlora"}
"""They build on adapters that are there already: tests/numbers holds them to what they promise."""
METHODS: dict[str, Any] = {
    name: default_plan(name, **SMALL.get(name, {})) for name in sorted(registry.METHODS) if name not in ON_OTHERS
}
COMBINATIONS: dict[str, Any] = {
    "lora+dropout": rl.LoRA(r=4, lora_dropout=0.3, lora_alpha=16),
    "lora+bias": rl.LoRA(r=4, lora_bias=True),
    "lora+pissa": rl.LoRA(r=4, init_lora_weights="pissa"),
    "lora+frozen_b": rl.LoRA(r=4, init_lora_weights="pissa", frozen="B"),
    "asymmetric+svd": rl.asymmetric_lora("hA_zero_B_U", r=4),
    "asymmetric+both": rl.AsymmetricLoRA(r=4, init_B="rand", update_A=True),
    "dora(vera)": rl.DoRA(rl.VeRA(r=32)),
    "dora(adalora)": rl.DoRA(rl.AdaLoRA(init_r=6, target_r=4)),
    "dora+columns": rl.DoRA(rl.LoRA(r=4), norm_axis="column"),
    "slices(dora)": rl.Slices(rl.DoRA(rl.LoRA(r=4))),
    "mixture(dora)+task": rl.Mixture(rl.DoRA(rl.LoRA(r=2)), 2, Task(2, 4, unknown=0)),
    "mixture(adalora)": rl.Mixture(rl.AdaLoRA(init_r=3, target_r=2), 2, Linear(bias=True)),
    "mixture(slices)+constant": rl.Mixture(rl.Slices(rl.LoRA(r=2)), 2, Constant((0.5, 1.0))),
    "mixture+topk": rl.Mixture(rl.LoRA(r=2), 3, TopK(2, "kept"), share=("A",)),
    "hydralora+top1": rl.hydralora(r=4, infer="top1"),
    "plan+biases": Plan(rl.LoRA(r=4), bias="lora_only"),
    "plan+patterns": Plan(rl.LoRA(r=4), rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 16.0}),
    "plan+parameters": Plan(rl.LoRA(r=4), target_modules=("q_proj",), target_parameters=("down_proj.weight",)),
    "plan+saved": Plan(rl.LoRA(r=4), target_modules=("q_proj",), modules_to_save=("lm_head", "layers.1.norm")),
    "plan+tokens": Plan(
        rl.LoRA(r=4), target_modules=("q_proj", "embed_tokens"), trainable_token_indices={"embed_tokens": (4, 7)}
    ),
    "plan+half": Plan(rl.LoRA(r=4), dtype="bfloat16"),
    "plan+rules": Plan(rl.LoRA(r=4), rules=(rl.LoRAPlus(ratio=8),)),
}
CONVOLUTIONAL = {"unrolled_lora"}
WITH_KERNELS = {"loha", "lokr"}
"""They have a setting for kernels: their settings are changed on convolutions."""
IN_BLOCKS = {"llava_mole"}
"""Their routers look at the module around a layer: they need a model with blocks, and no layer answers alone."""
ALONE = ("adds", "delta", "reached", "weights")
"""Checks that call a layer by itself."""
COMPILER = ("compile", "recompiles")
TRAINING = ("frozen", "gradients", "penalty", "resume", "fold_resume", "settings_matter")
"""Checks that train for many steps: on two layers."""
APART = (*COMPILER, "settings_matter")
ON_LLAMA = (
    "base_only", "detach", "independence", "merge", "unmerge", "frozen", "gradients", "checkpointing", "save_load",
    "copies", "pickles", "bf16", "switching", "rows", "rows_tensor", "threads",
)  # fmt: skip
EVERY = {**METHODS, **COMBINATIONS}
COMPILED = (
    "unrolled_lora",
    "lora+dropout",
    "lora+pissa",
    "dora(vera)",
    "dora+columns",
    "plan+parameters",
    "plan+saved",
)
"""Who meets the compiler beside the families."""
VARIED = {type(as_plan(plan).method): name for name, plan in reversed([*METHODS.items()]) if plan.store is None}
VARIED[rl.AsymmetricLoRA] = "asymmetric+both"
"""Where the settings of each class of methods can be changed one by one."""
INTERFACE = ("thin", "forward", "delta", "delta_bias", "row_norms", "repacked", "add")


def family(plan: Any) -> tuple[Any, ...]:
    """What the mechanism meets in the adapters of a plan: those who are alike here are alike to it.

    Which parts of the interface they have of their own, inside combinators too; whether they borrow, depend on their
    input, have rules, and bring a store.
    """
    plan = as_plan(plan)
    model = block_model()
    bank = rl.attach(model, replace(plan, store=None, start=None, target_modules=("q_proj", "down_proj")))
    site, *_ = bank.sites("default")
    each = [type(adapter) for _, adapter in bank.adapters("default", of=Adapter)]
    own = {tuple(n for n in INTERFACE if getattr(cls, n) is not getattr(Adapter, n)) for cls in each}
    depends = fixed_thin(site.adapter, site.base) is None
    rules = bool(plan.method.rules() or plan.rules)
    return frozenset(own), any(True for _ in borrowed(site.adapter)), depends, rules, plan.store is None


def _families() -> dict[tuple[Any, ...], str]:
    found: dict[tuple[Any, ...], str] = {}
    for name in sorted(METHODS.keys() - CONVOLUTIONAL, key=lambda name: (len(name), name)):
        found.setdefault(family(METHODS[name]), name)
    return found


FAMILIES = sorted(_families().values())
"""One method of each family, which meets a Llama and the compiler too."""


@cache
def contract(method: str) -> dict[str, Check]:
    plan = EVERY[method]
    if method in CONVOLUTIONAL:
        return on_convolutions(method)
    if isinstance(plan, Plan) and plan.target_modules != "all-linear":
        return {check.name: check for check in checks(plan, block_model, call, WORDS)}
    found = checks(plan, block_model, call, WORDS, target_modules=TARGETS)
    if method in IN_BLOCKS:
        return {check.name: check for check in found}
    quick = checks(plan, pair, call, POINTS, target_modules=["q_proj", "down_proj"])
    return {c.name: c for c in found} | {c.name: c for c in quick if c.name in (*COMPILER, *TRAINING)}


@cache
def on_convolutions(method: str) -> dict[str, Check]:
    found = checks(EVERY[method], conv_net, call, IMAGES, target_modules=["conv1", "conv2", "conv3"])
    return {check.name: check for check in found}


@cache
def contract_on_llama(method: str) -> dict[str, Check]:
    found = checks(EVERY[method], llama, logits, TEXTS, target_modules=TARGETS)
    return {check.name: check for check in found}


def _pairs(methods: Any, names: Any) -> list[Any]:
    return [pytest.param(method, name, id=f"{method}-{name}") for method in methods for name in names]


@pytest.mark.parametrize(("method", "name"), _pairs(EVERY, [name for name in NAMES if name not in APART]))
def test_contract(method: str, name: str) -> None:
    if method in IN_BLOCKS and name in ALONE:
        with pytest.raises(AssertionError, match="which is not running"):
            contract(method)[name]()
        return
    contract(method)[name]()


@pytest.mark.parametrize("method", VARIED.values())
def test_settings_matter(method: str) -> None:
    found = on_convolutions(method) if method in WITH_KERNELS else contract(method)
    found["settings_matter"]()


@pytest.mark.parametrize(("method", "name"), _pairs([*FAMILIES, *COMPILED], COMPILER))
def test_contract_compiled(method: str, name: str) -> None:
    contract(method)[name]()


@pytest.mark.parametrize(("method", "name"), _pairs(FAMILIES, ON_LLAMA))
def test_contract_on_llama(method: str, name: str) -> None:
    contract_on_llama(method)[name]()


@pytest.mark.parametrize("name", COMPILER)
def test_contract_on_llama_compiled(name: str) -> None:
    contract_on_llama("lora")[name]()


@pytest.mark.parametrize("method", FAMILIES)
def test_a_penalty_works_in_a_trainer(method: str, tmp_path: Path) -> None:
    """The check `penalty` with transformers' Trainer in the place of `fit`."""
    from transformers import Trainer, TrainingArguments

    from rankloom.hf.trainer import RankloomCallback, optimizer_for

    rows = [{"input_ids": row, "labels": row.flip(0)} for row in WORDS[0]]
    settings = TrainingArguments(str(tmp_path), max_steps=8, use_cpu=True, report_to="none", save_strategy="no")
    moved = []
    for weight in (0.0, 1e3):
        model = llama().eval()
        torch.manual_seed(0)
        bank = rl.attach(model, replace(as_plan(EVERY[method]), start=None, target_modules=tuple(TARGETS)))
        with torch.no_grad(), bank.using():
            base = logits(model, TEXTS[0])
        optimizer = optimizer_for(model, lr=2e-2, rules=[Penalty(weight)])
        Trainer(
            model, settings, train_dataset=rows, optimizers=(optimizer, None), callbacks=[RankloomCallback()]
        ).train()
        with torch.no_grad():
            moved.append(float((logits(model.eval(), TEXTS[0]) - base).square().mean()))
    free, penalised = moved
    assert 0 < penalised < 0.9 * free


def test_families_tell_methods_apart() -> None:
    """Every method is of a family that has a member among those that meet a Llama; and unlike ones are kept apart."""
    assert {family(METHODS[name]) for name in FAMILIES} == set(_families())
    assert {"lora", "dora", "vera", "molora", "slices", "qa_lora"} <= set(FAMILIES)
    assert family(rl.LoRA()) == family(rl.MELoRA()) == family(rl.NOLA())
    assert family(rl.VeRA()) == family(rl.TiedLoRA()) != family(rl.LoRA())
