"""Telling one base model from another: its structure exactly, its content by samples that a re-cast does not change.

Structure: every field of the config but those that do not change what the same tensors compute (`NEUTRAL`); without a
config the modules' classes and settings, as they print themselves; and names and shapes of all parameters and buffers.
Content: for each tensor the norm of up to 1024 values at seeded places and three signed sums of them; of tables with
many rows (embeddings, output heads) one value of every row, 1024 rows at a time. Two models are the same base if every
number agrees, to 1e-4 of the norm at the same precision and to 1e-2 across a re-cast; the precision is the narrowest
dtype that holds every sampled value, so weights that went through bfloat16 and back are recognised. A packed weight is
sampled by its parts: it is another base than the plain one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.graft import original_class
from rankloom.core.targets import base_modules, base_tensors
from rankloom.store.base import Packed, stored_tensors
from rankloom.store.bridges import bridge_of

SAMPLES = 1024
SUMS = 3
SAME, RECAST = 1e-4, 1e-2
"""Largest difference of a number, in units of the sample's norm, at the same precision and across a re-cast."""
TALL = 4
"""A table has at least so many times more rows than columns, and more than `SAMPLES`."""
NEUTRAL = re.compile(
    # names and versions
    r"_.*|name_or_path|transformers_version|architectures|auto_map|model_max_length|tokenizer_class|revision|adapter_.*"
    # how it is computed and kept, not what
    r"|dtype|torch_dtype|quantization_config|(.*_)?(attn|experts)_implementation|use_cache|cache_implementation"
    r"|gradient_checkpointing|chunk_size_feed_forward|torchscript|use_bfloat16|pretraining_tp|tp_plan|pp_plan"
    r"|use_mamba_kernels|use_mambapy|fuse_.*|kernel_config"
    # what is given back
    r"|output_attentions|output_hidden_states|output_router_logits|return_dict|use_return_dict|return_loss"
    # training
    r"|.*(dropout|dropout_prob|_pdrop|_drop|drop_path_rate|layerdrop)(_.*)?|initializer_.*|init_(std|factor|range)"
    r"|initializer|.*(aux|z)_loss_coef(ficient)?|.*loss_(coef(ficient)?|weight|type|reduction)|apply_spec_augment"
    r"|mask_(time|feature)_.*|ctc_.*|label_smoothing|router_jitter_noise|input_jitter_noise|rescale_prenorm_residual"
    # labels and special tokens: sizes show in the shapes
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|.*_token_ids?|.*_token_index"
    r"|(begin_)?suppress_tokens|forced_.*|vocab_size|tie_word_embeddings|tie_encoder_decoder|max_position_embeddings"
    # generation
    r"|max_length|min_length|max_new_tokens|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty"
    r"|temperature|top_k|top_p|typical_p|repetition_penalty|length_penalty|(encoder_)?no_repeat_ngram_size"
    r"|bad_words_ids|num_return_sequences|remove_invalid_values|exponential_decay_length_penalty|prefix"
    r"|return_dict_in_generate|output_scores"
)
"""Config fields, at any depth, by which the same tensors compute the same."""
ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
"""Said in one form for old and new configs."""

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
        if other != value and field != MODULES:
            return f"{field} is {value!r} here and was {other!r}"
    if saved["shapes"] != now["shapes"]:
        return f"names or shapes of the parameters differ ({now['tensors']} here, {saved['tensors']} then)"
    if saved["packed"] != now["packed"]:
        here, there = (", ".join(p["packed"]) or "not packed" for p in (now, saved))
        return f"the weights are {here} here and were {there}"
    if saved["config"].get(MODULES) != now["config"].get(MODULES):
        return "its modules are of other classes or have other settings (activations, strides, eps …)"
    if saved["sketch"] is None or now["sketch"] is None:
        return None
    most = SAME if saved["precision"] == now["precision"] else RECAST
    old, new = _numbers(saved["sketch"]), _numbers(now["sketch"])
    if len(old) != len(new):
        return "its fingerprint counts other samples"
    same = (old - new).abs().amax(1) <= most * old[:, 0].clamp_min(1e-12)
    if same.all():
        return None
    names = [name for name, _ in _groups(_tensors(model))]
    differing = (name for name, fits in zip(names, same.tolist(), strict=True) if not fits)
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
    for path, module in base_modules(model):
        for key, value in module._buffers.items():
            kept = value is not None and key not in module._non_persistent_buffers_set and key != "num_batches_tracked"
            if kept and value is not None:
                named[f"{path}.{key}" if path else key] = value
    return dict(sorted(named.items()))


MODULES = "modules"
"""Among the config's fields, where a model has none: a digest of how its modules print themselves."""


def _config(model: nn.Module) -> dict[str, Any]:
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if not callable(to_dict):
        return {MODULES: _printed(model)}
    return dict(json.loads(json.dumps(dict(_fields(to_dict())), default=str), parse_constant=str))


def _fields(said: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields that matter, by dotted name."""
    for key, value in said.items():
        if NEUTRAL.fullmatch(str(key)) or key in ROPE:
            continue
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
    rope = dict(said.get("rope_parameters") or said.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", said.get("rope_theta"))
    rope = {k: v for k, v in rope.items() if (k, v) not in (("rope_type", "default"), ("type", "default"))}
    yield from ((f"{prefix}{k}", v) for k, v in (("rope_theta", theta), ("rope", rope)) if v)


SAID_ELSEWHERE = (nn.modules.dropout._DropoutNd, nn.ParameterDict, nn.ParameterList, torch.jit.ScriptModule)
"""Modules without settings that count: they print their parameters, or act in training only."""


def _printed(model: nn.Module) -> str:
    lines = (
        f"{path}:{original_class(module).__name__}({module.extra_repr()})"
        for path, module in base_modules(model)
        if not isinstance(module, SAID_ELSEWHERE)
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Sampled values in float64, several times under the name of a tall table."""
    for name, tensor in tensors.items():
        parts = _parts(tensor)
        if len(parts) == 1 and _tall(parts[0]):
            rows, columns = parts[0].shape
            places = torch.arange(rows) * columns + torch.arange(rows) * 7919 % columns
            values = parts[0].reshape(-1)[places.to(parts[0].device)].to("cpu", torch.float64)
            yield from ((name, group) for group in torch.split(values, SAMPLES))
        samples = [_sampled(part) for part in parts]
        yield name, samples[0] if len(samples) == 1 else torch.cat(samples)


def _tall(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.shape[0] > max(SAMPLES, TALL * tensor.shape[1])


def _content(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if any(t.device.type == "meta" for t in tensors.values()):
        return {"precision": "unknown", "sketch": None}
    groups = list(_groups(tensors))
    by_length: dict[int, list[tuple[int, Tensor]]] = {}
    for place, (_, values) in enumerate(groups):
        by_length.setdefault(len(values), []).append((place, values))
    numbers, narrow = torch.empty(len(groups), 1 + SUMS), {torch.bfloat16, torch.float16, torch.float32}
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
        rows, rest = divmod(len(base64.b64decode(text, validate=True)), 4 * (1 + SUMS))
        return rows >= tensors and not rest
    except ValueError:
        return False
