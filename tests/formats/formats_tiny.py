"""A tiny model, a saved adapter of it, and tools to write broken folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankloom as rl

X = torch.linspace(-1, 1, 24).reshape(3, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.v(torch.tanh(self.q(x))))


class Net(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(8)
        self.score = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.score(self.norm(x))


def net(depth: int = 2, seed: int = 5) -> Net:
    torch.manual_seed(seed)
    return Net(depth).eval()


def shake(bank: Any, name: str = "default", size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(11)
    for _, parameter, _ in bank.tensors(name):
        if parameter.is_floating_point():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * size)


def adapted(plan: Any = None, **settings: Any) -> Net:
    model = net()
    bank = rl.attach(model, plan or rl.LoRA(r=4, lora_alpha=6.0), **{"target_modules": ["q", "v"], **settings})
    shake(bank)
    return model


def saved(folder: Path, **settings: Any) -> Path:
    rl.save(adapted(**settings), folder)
    return folder


def bare(folder: Path, **settings: Any) -> Path:
    """A folder as others write it: without a manifest."""
    saved(folder, **settings)
    (folder / "manifest.json").unlink()
    return folder


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder: Path, **changes: Any) -> None:
    data = {k: v for k, v in {**config(folder), **changes}.items() if v is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(data))


def edit_tensors(folder: Path, **changes: Any) -> None:
    """Change tensors by the end of their key; `...` takes one away, a new key adds one."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for ending, value in changes.items():
        hit = [k for k in tensors if k.endswith(ending)] or [ending]
        for key in hit:
            if value is ...:
                del tensors[key]
            else:
                tensors[key] = value(tensors[key]) if callable(value) else value
    save_file({k: t.contiguous() for k, t in tensors.items()}, path)
