"""Whether a model predicts each token from the ones before it, and keeps packed examples apart: asked of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.errors import SettingsError
from rankloom.train.data.batches import Batches
from rankloom.train.modes import mode
from rankloom.train.rng import untouched_rng

EXACT, CLOSE, ROUNDED = 1e-5, 2e-3, 5e-2
"""How far logits of one function may be apart, relative to their norm: 32 bits on a CPU, elsewhere, fewer bits."""


@contextmanager
def checked_batches(model: nn.Module, each: Sequence[Any], own_loss: bool) -> Iterator[None]:
    """`model` fits the `Batches` among `each`, and among the streams of a mapping; inside the block it keeps their
    packed examples apart.

    transformers lets attention see where examples begin only without a cache of keys and values, so the cache is off
    inside the block. `own_loss`: the loss is not the model's own, so what it predicts is not known.

    Raises:
        SettingsError: texts to continue are to train a model that sees the token it is to predict, or packed examples
            change one another.
    """
    sources = [s for one in each for s in (one.values() if isinstance(one, Mapping) else (one,))]
    found = [batches for batches in sources if isinstance(batches, Batches)]
    for batches in found:
        if not own_loss:
            check_causal(model, batches)
    packed = [batches for batches in found if batches.packing]
    configs = _configs(model) if packed else []
    before = [config.use_cache for config in configs]
    try:
        for config in configs:
            config.use_cache = False
        for batches in packed:
            check_packing(model, batches)
        yield
    finally:
        for config, was in zip(configs, before):
            config.use_cache = was


def _configs(model: nn.Module) -> list[Any]:
    """The settings of a model of transformers that say whether it keeps keys and values."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    each = {id(c): c for c in (config, text() if callable(text) else None) if hasattr(c, "use_cache")}
    return list(each.values())


def check_causal(model: nn.Module, batches: Batches) -> None:
    """Refuse a model of transformers that looks at the very tokens it is to predict."""
    if not batches.causal or not hasattr(model, "config"):
        return
    if getattr(model.config, "is_encoder_decoder", False):
        raise SettingsError(
            f"{type(model).__name__} is an encoder-decoder: given these batches, it would learn to copy its input; "
            "use a causal model, or batches of your own with input_ids and labels"
        )
    ids = torch.tensor(batches.prepared[0].ids)[None]
    other = next((int(i) for x in batches.prepared for i in x.ids if i != ids[0, -1]), None)
    if ids.shape[1] < 2 or other is None:
        return
    changed = ids.clone()
    changed[0, -1] = other
    try:
        a, b = (_logits(model, input_ids=x, attention_mask=torch.ones_like(x)) for x in (ids, changed))
    except TypeError:
        return
    if a is None or b is None or a.ndim != 3:
        return
    if _apart(a[:, :-1], b[:, :-1]) > _tolerance(model):
        raise SettingsError(
            f"{type(model).__name__} is no causal model: a token changes what is predicted before it, so it would "
            "see the answer that it is to give. Load it with model.task=masked-lm (rankloom train), give it data with "
            "a label column, or use a causal model"
        )


def check_packing(model: nn.Module, batches: Batches) -> None:
    """Refuse a model whose answer to an example depends on the example before it in the row."""
    row = next((row for row in map(list, batches.rows) if len(row) > 1), None)
    if row is None:
        return
    first, second = (torch.tensor(batches.prepared[i].ids) for i in row[:2])
    positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None]
    name = type(model).__name__
    remedy = "leave packing out (data.packing=false); for few padding tokens, use a smaller batch_size with accumulate"
    try:
        alone = _logits(model, input_ids=second[None], attention_mask=torch.ones_like(second)[None])
        with_first, with_other = (
            _logits(model, input_ids=torch.cat([x, second])[None], position_ids=positions)
            for x in (first, first.flip(0))
        )
    except TypeError as error:
        raise SettingsError(f"packing=True: {name} does not take position_ids ({error}); {remedy}") from error
    if alone is None or with_first is None or with_other is None:
        raise SettingsError(f"packing=True: {name} gives no logits, so packing cannot be checked; {remedy}")
    with_first, with_other = with_first[:, len(first) :], with_other[:, len(first) :]
    found = max(_apart(with_first, alone), _apart(with_other, with_first))
    if not found <= _tolerance(model):
        raise SettingsError(
            f"packing=True: {name} does not keep packed examples apart: the answer to one changes by {found:.1g} of "
            f"its size with the example before it; {remedy}"
        )


def _logits(model: nn.Module, **batch: Tensor) -> Tensor | None:
    device = next(model.parameters()).device
    with untouched_rng(), mode(model, False), torch.no_grad():
        out = model(**{name: value.to(device) for name, value in batch.items()})
    found = getattr(out, "logits", out)
    return found if isinstance(found, Tensor) else None


def _apart(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-30))


def _tolerance(model: nn.Module) -> float:
    parameters = list(model.parameters())
    if any(p.dtype not in (torch.float32, torch.float64) for p in parameters):
        return ROUNDED
    return EXACT if all(p.device.type == "cpu" for p in parameters) else CLOSE
