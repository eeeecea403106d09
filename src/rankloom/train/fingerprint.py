"""A short name for a base model's content, to tell one base from another."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from rankloom.core.targets import base_tensors
from rankloom.store.base import Packed

SAMPLES = 64
"""Values read from each tensor, evenly spaced."""


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and sampled values of every parameter of the base; adapters do not count."""
    digest = hashlib.sha256()
    for path, _, key, tensor in sorted(base_tensors(model), key=lambda entry: (entry[0], entry[2])):
        digest.update(f"{path}.{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for part in tensor.parts.values() if isinstance(tensor, Packed) else (_whole(tensor.detach()),):
            flat = part.reshape(-1)
            picked = flat[:: max(1, flat.numel() // SAMPLES)]
            if picked.device.type != "meta":
                digest.update(picked.to("cpu", torch.float64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is split over processes; every process must ask."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
