"""The small models that every method meets: a transformer block in plain torch, a Llama, and a net of convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tiny

WIDTH, VOCABULARY = 12, 17


class Block(nn.Module):
    """Attention over the tokens before, and a gated MLP; the names of Llama."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(d, d)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.o_proj = nn.Linear(d, d)
        self.up_proj = nn.Linear(d, 2 * d)
        self.down_proj = nn.Linear(2 * d, d, bias=False)
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        x = x + self.o_proj(scores.masked_fill(~past, float("-inf")).softmax(-1) @ v)
        out: Tensor = x + self.down_proj(torch.tanh(self.up_proj(x)))
        return out


class BlockModel(nn.Module):
    """An embedding, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block(WIDTH) for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.lm_head(x)
        return out


class ConvNet(nn.Module):
    """Three convolutions with square kernels and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.conv3 = nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv3(torch.tanh(self.conv2(torch.tanh(self.conv1(x))))).mean((-1, -2))
        return out


def block_model() -> nn.Module:
    torch.manual_seed(0)
    return BlockModel()


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet()


def llama() -> nn.Module:
    return tiny.llama(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        attn_implementation="eager",
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )


class Pair(nn.Module):
    """Two layers: quick to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, 24)
        self.down_proj = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(torch.tanh(self.q_proj(x)))
        return out


def pair() -> nn.Module:
    torch.manual_seed(0)
    return Pair()


def call(model: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = model(batch)
    return out


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    out: Tensor = model(**batch, use_cache=False).logits
    return out


def _words(seed: int, rows: int = 4, tokens: int = 6) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


WORDS = [_words(0), _words(1, rows=3)]
TEXTS = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in WORDS]
IMAGES = [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(s)) for s in range(2)]
POINTS = [torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(s)) for s in range(2)]
