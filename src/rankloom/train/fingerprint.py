"""A short name for a base model's content, to tell one base from another."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from rankloom.core.targets import base_tensors
from rankloom.store.base import stored_tensors
from rankloom.store.bridges import bridge_of

SAMPLES = 64
"""Values read from each tensor, evenly spaced."""


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """SHA-256 over name, shape, dtype and sampled values of every parameter of the base; adapters do not count.

    Of a weight that another library keeps in few bits only the codes count: bitsandbytes moves the scales about.
    """
    digest = hashlib.sha256()
    for path, _, key, tensor in sorted(base_tensors(model), key=lambda entry: (entry[0], entry[2])):
        digest.update(f"{path}.{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for part in stored_tensors(tensor) if bridge_of(tensor) is None else stored_tensors(tensor)[:1]:
            flat = part.reshape(-1)
            picked = flat[:: max(1, flat.numel() // SAMPLES)]
            if picked.device.type != "meta":
                digest.update(picked.to("cpu", torch.float64).contiguous().numpy().tobytes())
    return digest.hexdigest()
