"""Telling one base model from another: its structure exactly, its content by samples that a re-cast does not change.

Structure: the config fields that change what the same tensors compute, and names and shapes of all parameters. Content:
for each parameter the norm of up to 1024 values at seeded places and three signed sums of them. Two models are the same
base if every number agrees, to 1e-4 of the norm at the same precision and to 1e-2 across a re-cast; the precision is
the narrowest dtype that holds every sampled value, so weights that went through bfloat16 and back are recognised. A
packed weight is sampled by its parts: it is another base than the plain one.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.targets import base_tensors
from rankloom.store.base import Packed, stored_tensors
from rankloom.store.bridges import bridge_of

SAMPLES = 1024
SUMS = 3
SAME, RECAST = 1e-4, 1e-2
"""Largest difference of a number, in units of the sample's norm, at the same precision and across a re-cast."""
FIELDS = (
    "activation_function", "attention_multiplier", "attn_logit_softcapping", "embedding_multiplier",
    "final_logit_softcapping", "head_dim", "hidden_act", "hidden_activation", "layer_norm_eps", "layer_norm_epsilon",
    "layer_types", "logits_scaling", "max_window_layers", "model_type", "n_head", "norm_eps", "norm_topk_prob",
    "num_attention_heads", "num_experts_per_tok", "num_heads", "num_key_value_heads", "partial_rotary_factor",
    "position_embedding_type", "query_pre_attn_scalar", "residual_multiplier", "rms_norm_eps", "scale_attn_weights",
    "sliding_window", "use_sliding_window",
)  # fmt: skip
"""Config fields that matter and that no shape shows; rope is added in one form for old and new configs."""

Print = dict[str, Any]


@torch.no_grad()
def fingerprint(model: nn.Module) -> Print:
    """The base's fingerprint as JSON values; adapters do not count. `sketch` is None while weights are on meta."""
    tensors = _tensors(model)
    shapes = "".join(f"{name} {tuple(t.shape)}\n" for name, t in tensors.items())
    found = {
        "config": _config(model),
        "shapes": hashlib.sha256(shapes.encode()).hexdigest(),
        "tensors": len(tensors),
        "packed": sorted({how for t in tensors.values() if (how := _packed(t)) is not None}),
    }
    return {**found, **_content(tensors)}


def short(print_: Mapping[str, Any]) -> str:
    """Twelve hex digits that stand for a fingerprint in messages."""
    return hashlib.sha256(json.dumps(print_, sort_keys=True).encode()).hexdigest()[:12]


def difference(model: nn.Module, saved: Mapping[str, Any], now: Mapping[str, Any], skip: Collection[str]) -> str | None:
    """In words, how the base of `saved` is not the base of `now`, which is `model`; None if it is the same.

    `skip`: parameters whose content does not matter, because the adapter replaces them.
    """
    for field, value in now["config"].items():
        other = saved["config"].get(field, value)
        if other != value:
            return f"{field} is {value!r} here and was {other!r}"
    if saved["shapes"] != now["shapes"]:
        return f"names or shapes of the parameters differ ({now['tensors']} here, {saved['tensors']} then)"
    if saved["packed"] != now["packed"]:
        here, there = (", ".join(p["packed"]) or "not packed" for p in (now, saved))
        return f"the weights are {here} here and were {there}"
    if saved["sketch"] is None or now["sketch"] is None:
        return None
    most = SAME if saved["precision"] == now["precision"] else RECAST
    old, new = _numbers(saved["sketch"]), _numbers(now["sketch"])
    same = (old - new).abs().amax(1) <= most * old[:, 0].clamp_min(1e-12)
    if same.all():
        return None
    differing = (name for name, fits in zip(_tensors(model), same.tolist(), strict=True) if not fits)
    name = next((name for name in differing if name not in skip), None)
    return None if name is None else f"the values of {name!r} differ"


def check_print(data: Any) -> str | None:
    """What is wrong with a fingerprint that was read from a file, or None."""
    kinds = {"config": dict, "shapes": str, "tensors": int, "packed": list, "precision": str}
    if not isinstance(data, dict) or set(data) != {*kinds, "sketch"}:
        return "it has other fields"
    wrong = next((k for k, kind in kinds.items() if type(data[k]) is not kind), None)
    if wrong is not None:
        return f"{wrong!r} is {data[wrong]!r}"
    sketch = data["sketch"]
    if sketch is not None and (not isinstance(sketch, str) or not _is_sketch(sketch, data["tensors"])):
        return "its sketch does not fit its number of tensors"
    return None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = {f"{path}.{key}" if path else key: tensor for path, _, key, tensor in base_tensors(model)}
    return dict(sorted(named.items()))


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    said: dict[str, Any] = to_dict() if callable(to_dict) else {}
    found = {key: said[key] for key in FIELDS if said.get(key) is not None}
    rope = dict(said.get("rope_parameters") or said.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", said.get("rope_theta"))
    rope = {k: v for k, v in rope.items() if (k, v) not in (("rope_type", "default"), ("type", "default"))}
    found |= {k: v for k, v in (("rope_theta", theta), ("rope", rope)) if v}
    return dict(json.loads(json.dumps(found, default=str)))


def _content(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if any(t.device.type == "meta" for t in tensors.values()):
        return {"precision": "unknown", "sketch": None}
    by_length: dict[int, list[tuple[int, Tensor]]] = {}
    for place, tensor in enumerate(tensors.values()):
        samples = [_sampled(part) for part in _parts(tensor)]
        values = samples[0] if len(samples) == 1 else torch.cat(samples)
        by_length.setdefault(len(values), []).append((place, values))
    numbers, narrow = torch.empty(len(tensors), 1 + SUMS), {torch.bfloat16, torch.float16, torch.float32}
    for length, found in by_length.items():
        rows = torch.stack([values for _, values in found])
        narrow = {dtype for dtype in narrow if torch.equal(rows.to(dtype).double(), rows)}
        told = torch.cat([rows.norm(dim=1, keepdim=True), rows @ _signs(length).T], dim=1)
        numbers[[place for place, _ in found]] = told.float()
    order = (torch.bfloat16, torch.float16, torch.float32)
    precision = next((str(d).removeprefix("torch.") for d in order if d in narrow), "float64")
    return {"precision": precision, "sketch": base64.b64encode(numbers.contiguous().numpy().tobytes()).decode()}


def _packed(tensor: Tensor) -> str | None:
    """The class that keeps a tensor in few bits, ours or another library's."""
    if isinstance(tensor, Packed):
        return type(tensor.store).__name__
    return None if bridge_of(tensor) is None else type(tensor).__name__


def _parts(tensor: Tensor) -> list[Tensor]:
    """What is held for a tensor; of another library's weights the codes alone, for bitsandbytes moves scales about."""
    held = [_whole(part) for part in stored_tensors(tensor)]
    return held if bridge_of(tensor) is None else held[:1]


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is split over processes; every process must ask."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _sampled(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    if len(flat) > SAMPLES:
        flat = flat[_places(len(flat)).to(flat.device)]
    return flat.to("cpu", torch.float64)


@lru_cache(maxsize=256)
def _places(count: int) -> Tensor:
    return torch.randint(0, count, (SAMPLES,), generator=torch.Generator().manual_seed(count))


@lru_cache(maxsize=256)
def _signs(count: int) -> Tensor:
    """(SUMS, count) of ±1."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 2, (SUMS, count), generator=generator).double() * 2 - 1


def _numbers(sketch: str) -> Tensor:
    raw = bytearray(base64.b64decode(sketch))
    return torch.frombuffer(raw, dtype=torch.float32).reshape(-1, 1 + SUMS) if raw else torch.empty(0, 1 + SUMS)


def _is_sketch(text: str, tensors: int) -> bool:
    try:
        return len(base64.b64decode(text, validate=True)) == tensors * 4 * (1 + SUMS)
    except ValueError:
        return False
