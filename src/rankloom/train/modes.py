"""Training and evaluation mode of a model, and whether it has adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rankloom.core.bank import Bank
from rankloom.core.slots import slot_table


def bank_or_none(model: nn.Module) -> Bank | None:
    """The model's bank, if it has one."""
    found = getattr(model, "rankloom", None)
    return found if isinstance(found, Bank) else None


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode inside the block; each module's own mode is put back after.

    With adapters, normalisations whose running statistics belong to the frozen base stay in evaluation mode: in
    training mode they would change the base.
    """
    before = [(m, m.training) for m in model.modules()]
    try:
        model.train(training)
        if training and bank_or_none(model) is not None:
            for module in model.modules():
                if base_statistics(module):
                    module.training = False
        yield
    finally:
        for module, was in before:
            module.training = was


def base_statistics(module: nn.Module) -> bool:
    """True for a normalisation with running statistics that no adapter owns."""
    return (
        "running_mean" in module._buffers
        and module._buffers["running_mean"] is not None
        and not slot_table(module, "running_mean")
    )
