"""G6: floating-point operations of the adapters in one step of model "M", to 6·T·r·(out + in) of every layer.

OMP_NUM_THREADS=1 python bench/flops.py     torch's FlopCounterMode; the limit's own operations are taken off
"""

from __future__ import annotations

import torch
from _measure import Gate, record
from _model_m import RANK, TARGETS, base, batch, limit, lora, ours, peft
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def counted(model: nn.Module, ids: Tensor) -> int:
    """Operations of forward and backward, the gradient of the input embeddings among them."""
    model(input_ids=ids[:, :2])  # a first pass shows which layers read the same input
    model.get_input_embeddings().register_forward_hook(lambda _m, _x, y: y.requires_grad_(True))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


def gate(model: nn.Module, ids: Tensor) -> Gate:
    floor = counted(limit(model), ids)
    thin = sum(
        6 * ids.numel() * RANK * (layer.out_features + layer.in_features)
        for name, layer in model.named_modules()
        if name.rsplit(".", 1)[-1] in TARGETS
    )
    mine, theirs = (counted(m, ids) - floor for m in (ours(model, lora()), peft(model)))
    return Gate("G6 LoRA FLOPs to 6Tr(d+k)", mine / thin, theirs / thin, 1.0, 1.05)


def main() -> None:
    torch.set_num_threads(1)
    record([gate(base(), batch())])


if __name__ == "__main__":
    main()
