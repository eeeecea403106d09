"""Every registered method, preset and a choice of combinations keeps every promise of the contract."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
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
from rankloom.core.plan import Plan
from rankloom.gates.constant import Constant
from rankloom.gates.linear import Linear
from rankloom.gates.task import Task
from rankloom.gates.topk import TopK
from rankloom.testing import NAMES, Check, checks

TARGETS = ["q_proj", "up_proj", "down_proj"]
SMALL: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 6, "target_r": 4},
    "asymmetric_lora": {"r": 4},
    "dylora": {"r": 4},
    "loftq": {"r": 4},
    "lq_lora": {"r": 4},
    "lqer": {"r": 4},
    "mixture": {"n": 2},
    "moelora_task": {"r": 4, "n": 2, "task_embedding_dim": 4, "unknown": 1},
    "molora": {"r": 2, "n": 3},
    "qa_lora": {"r": 4, "group_size": 2},
    "qdylora": {"r": 4},
    "qlora": {"r": 4},
    "unrolled_lora": {"r": 2},
    "vera": {"r": 32},
}
METHODS: dict[str, Any] = {
    name: registry.default_plan(name, **SMALL.get(name, {})) for name in sorted(registry.METHODS)
}
COMBINATIONS: dict[str, Any] = {
    "lora+dropout": rl.LoRA(r=4, lora_dropout=0.3, lora_alpha=16),
    "lora+bias": rl.LoRA(r=4, lora_bias=True),
    "lora+pissa": rl.LoRA(r=4, init_lora_weights="pissa"),
    "lora+frozen_b": rl.LoRA(r=4, init_lora_weights="pissa", frozen="B"),
    "asymmetric+svd": rl.asymmetric_lora("hA_zero_B_U", r=4),
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
COMPILER = ("compile", "recompiles")
ON_LLAMA = (
    "silence", "detach", "independence", "merge", "unmerge", "frozen", "gradients", "checkpointing", "save_load", "copies",
    "pickles", "bf16", "switching", "rows", "rows_tensor", "threads",
)  # fmt: skip
EVERY = {**METHODS, **COMBINATIONS}


@cache
def contract(method: str) -> dict[str, Check]:
    plan = EVERY[method]
    if method in CONVOLUTIONAL:
        found = checks(plan, conv_net, call, IMAGES, target_modules=["conv1", "conv2", "conv3"])
        return {check.name: check for check in found}
    if isinstance(plan, Plan) and plan.target_modules != "all-linear":
        return {check.name: check for check in checks(plan, block_model, call, WORDS)}
    found = checks(plan, block_model, call, WORDS, target_modules=TARGETS)
    quick = checks(plan, pair, call, POINTS, target_modules=["q_proj", "down_proj"])
    return {c.name: c for c in found} | {c.name: c for c in quick if c.name in COMPILER}


@cache
def contract_on_llama(method: str) -> dict[str, Check]:
    found = checks(EVERY[method], llama, logits, TEXTS, target_modules=TARGETS)
    return {check.name: check for check in found}


def _pairs(methods: Any, names: Any) -> list[Any]:
    return [pytest.param(method, name, id=f"{method}-{name}") for method in methods for name in names]


@pytest.mark.parametrize(("method", "name"), _pairs(EVERY, NAMES))
def test_contract(method: str, name: str) -> None:
    contract(method)[name]()


@pytest.mark.parametrize(("method", "name"), _pairs([m for m in METHODS if m not in CONVOLUTIONAL], ON_LLAMA))
def test_contract_on_llama(method: str, name: str) -> None:
    contract_on_llama(method)[name]()


@pytest.mark.parametrize("name", COMPILER)
def test_contract_on_llama_compiled(name: str) -> None:
    contract_on_llama("lora")[name]()
