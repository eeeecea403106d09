"""Tiny models of many architectures, by the name of their class; vocabulary of 64 tokens, no dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

V = 64
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
"""Of the smallest decoder."""


def llama(seed: int = 0, **changes: Any) -> Any:
    """The smallest Llama, with random weights; `changes` to its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def llama_like(name: str, **changes: Any) -> Callable[[], nn.Module]:
    """A decoder whose settings go by Llama's names."""
    usual = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    return of(name, **{**usual, **changes})


def of(name: str, head: str = "ForCausalLM", **settings: Any) -> Callable[[], nn.Module]:
    """A maker of the model class `name + head`, seeded."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**settings)
        torch.manual_seed(0)
        return getattr(transformers, f"{name}{head}")(config).eval()

    return make


BERT = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
T5 = {
    "vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
GPT2 = {
    "vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = {
    "vocab_size": V, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.0,
}  # fmt: skip
BLOOM = {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0}
MAMBA = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
NEOX = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
