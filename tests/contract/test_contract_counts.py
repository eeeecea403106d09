"""Trained numbers on the meta device at the size of Llama-2 7B, against the closed formulas of the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import rankloom as rl
from rankloom.testing import count

HIDDEN, INNER, LAYERS = 4096, 11008, 32
SITES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, HIDDEN),
    "v_proj": (HIDDEN, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}
"""(out, in) of the linear layers of a block."""


def llama_2_7b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    return LlamaForCausalLM(config)


R, N = 16, 3
FORMULAS: dict[str, tuple[Any, Callable[[int, int, int], int]]] = {
    "lora": (lambda r: rl.LoRA(r=r), lambda o, i, r: r * (o + i)),
    "rslora": (lambda r: rl.rslora(r=r), lambda o, i, r: r * (o + i)),
    "lora_fa": (lambda r: rl.lora_fa(r=r), lambda o, i, r: r * o),
    "asymmetric_lora": (lambda r: rl.AsymmetricLoRA(r=r), lambda o, i, r: r * o),
    "asymmetric_lora-hA": (lambda r: rl.asymmetric_lora("hA_zero_B_rand", r=r), lambda o, i, r: r * i),
    "lora+bias": (lambda r: rl.LoRA(r=r, lora_bias=True), lambda o, i, r: r * (o + i) + o),
    "dora": (lambda r: rl.DoRA(rl.LoRA(r=r)), lambda o, i, r: r * (o + i) + o),
    "dora-columns": (lambda r: rl.DoRA(rl.LoRA(r=r), norm_axis="column"), lambda o, i, r: r * (o + i) + i),
    "vera": (lambda r: rl.VeRA(r=r), lambda o, i, r: o + r),
    "dora(vera)": (lambda r: rl.DoRA(rl.VeRA(r=r)), lambda o, i, r: 2 * o + r),
    "adalora": (lambda r: rl.AdaLoRA(init_r=r, target_r=r), lambda o, i, r: r * (o + i + 1)),
    "hydralora": (lambda r: rl.hydralora(r=r, n_b=N), lambda o, i, r: r * i + N * r * o + N * i),
    "slices": (lambda r: rl.Slices(rl.LoRA(r=r), parts=2, on=(0,)), lambda o, i, r: r * (o // 2 + i)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_count(name: str) -> None:
    build, formula = FORMULAS[name]
    expected = LAYERS * sum(formula(o, i, R) for o, i in SITES.values())
    count(build(R), expected, llama_2_7b)()


def test_published_counts() -> None:
    """LoRA r=8 on q and v of a 7B Llama is 4.2 million; VeRA's own tables count L(o + r)."""
    count(rl.LoRA(r=8), 4_194_304, llama_2_7b, target_modules=["q_proj", "v_proj"])()
    count(rl.VeRA(r=256), 64 * (4096 + 256), llama_2_7b, target_modules=["q_proj", "v_proj"])()


def test_unrolled_lora_count() -> None:
    """r·k·(in·k) for A and (out·k)·(r·k) for B of a k × k kernel."""
    r, o, i, k = 4, 640, 320, 3

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(i, o, k))

    count(rl.UnrolledLoRA(r=r), r * k * i * k + o * k * r * k, make, target_modules=["0"])()
