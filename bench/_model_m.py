"""Model "M" of the gates: 69 M parameters, rank 16 on the seven kinds of linear layers; ours, PEFT's, the limit."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rankloom as rl
from peft import LoraConfig, get_peft_model

SHAPE = {
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 16, 32


def base(dtype: torch.dtype = torch.float32, **shape: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **shape})).to(dtype).train()


def limit(model: nn.Module) -> nn.Module:
    """Everything frozen, and the gradient flows from the loss to the input embeddings."""
    model = copy.deepcopy(model).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _m, _x, y: y.requires_grad_(True))
    return model


def ours(model: nn.Module, method: rl.Method) -> nn.Module:
    model = copy.deepcopy(model)
    rl.attach(model, method, target_modules=TARGETS)
    return model


def peft(model: nn.Module, frozen_a: bool = False, **settings: object) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, **settings)
    model = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in model.named_parameters():
        if frozen_a and "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def lora(**settings: object) -> rl.Method:
    return rl.LoRA(r=RANK, lora_alpha=ALPHA, **settings)


def batch(rows: int = 4, tokens: int = 256, words: int = 8192) -> Tensor:
    return torch.randint(0, words, (rows, tokens), generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Forward, backward, and AdamW on whatever trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run
