"""What the rows about files share: a tiny base, a good adapter of it, and folders as bytes that can be broken."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankloom as rl
from rankloom.formats.manifest import CONFIG, WEIGHTS

Files = dict[str, bytes]
IDS = torch.arange(3, 35).reshape(2, 16)
RANK = 8


def base(seed: int = 0, **changes: Any) -> nn.Module:
    """A Llama of two layers with random weights, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, **changes,
    }  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    return model


def adapted(model: nn.Module, name: str = "default", seed: int = 1, method: Any = None) -> nn.Module:
    """The model with a LoRA on q and v whose factors are all random."""
    bank = rl.attach(model, method or rl.LoRA(r=RANK, lora_alpha=16.0), name, target_modules=["q_proj", "v_proj"])
    generator = torch.Generator().manual_seed(seed)
    for _, parameter, _ in bank.tensors(name):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    """The logits of a fixed batch."""
    found: Tensor = model(IDS).logits
    return found


def digest(value: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(value.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def state_digest(model: nn.Module) -> str:
    """SHA-256 over every tensor of a bare model."""
    return hashlib.sha256("".join(f"{k}{digest(v)}" for k, v in model.state_dict().items()).encode()).hexdigest()


def good(model: nn.Module | None = None) -> Files:
    """The files of a good adapter of `base()`, manifest included."""
    with folder() as root:
        rl.save(model or adapted(base()), root / "a")
        return {path.name: path.read_bytes() for path in sorted((root / "a").iterdir())}


@contextmanager
def folder() -> Iterator[Path]:
    """An empty folder for the time being."""
    root = Path(tempfile.mkdtemp(prefix="rankloom-board-"))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def bare(files: Mapping[str, bytes]) -> Files:
    """The two files that PEFT knows."""
    return {name: files[name] for name in (CONFIG, WEIGHTS)}


def write(files: Mapping[str, bytes], to: Path) -> Path:
    """The files as a folder."""
    to.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (to / name).write_bytes(data)
    return to


def config_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The config as data."""
    return dict(json.loads(files[CONFIG]))


def with_config(files: Mapping[str, bytes], **changes: Any) -> Files:
    """Config fields changed; `...` takes one away."""
    data = {k: v for k, v in {**config_of(files), **changes}.items() if v is not ...}
    return {**files, CONFIG: json.dumps(data).encode()}


def split(files: Mapping[str, bytes]) -> tuple[dict[str, Any], bytes]:
    """(header, body) of the weights."""
    raw = files[WEIGHTS]
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, raw[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    """A weights file of a header (data, or bytes as they are) and a body."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def tensors_of(files: Mapping[str, bytes]) -> dict[str, Tensor]:
    """The tensors of the weights."""
    from safetensors.torch import load

    return load(files[WEIGHTS])


def with_tensors(files: Mapping[str, bytes], **changes: Any) -> Files:
    """Tensors changed by key; `...` takes one away."""
    from safetensors.torch import save

    found = {k: v for k, v in {**tensors_of(files), **changes}.items() if v is not ...}
    return {**files, WEIGHTS: save({k: v.contiguous() for k, v in found.items()})}


@contextmanager
def silent() -> Iterator[None]:
    """No warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
