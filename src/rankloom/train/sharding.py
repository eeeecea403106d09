"""A frozen base split over the processes (FSDP2), with whole adapters in each of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

from rankloom.core.targets import base_tensors
from rankloom.errors import SettingsError
from rankloom.store.base import Packed
from rankloom.train.modes import bank_or_none
from rankloom.train.processes import Processes
from rankloom.train.settings import TrainSettings


def shard(model: nn.Module, settings: TrainSettings, processes: Processes) -> None:
    """With `sharding="fsdp"`: split the base of an adapted model by rows, in place; a base that is split stays so.

    Each block of the model is gathered when its forward or backward needs it, and let go after. Adapters are small:
    all of their tensors stay whole in every process, and so do packed weights, whose rows cannot be cut.
    """
    if settings.sharding == "none":
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    bank = bank_or_none(model)
    if bank is None:
        raise SettingsError(
            f"sharding='fsdp' splits a frozen base, and this {type(model).__name__} has no adapters, so all of it "
            "trains: rankloom.attach(model, …) first, or sharding='none'"
        )
    if processes.world == 1:
        warnings.warn("sharding='fsdp' with one process: nothing to split; torchrun starts several", stacklevel=3)
        return
    if isinstance(model, FSDPModule):
        return
    base = {id(tensor) for _, _, _, tensor in base_tensors(model)}
    whole = {p for p in model.parameters() if id(p) not in base or isinstance(p, Packed)}
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for part in (*blocks(model), model):
        fully_shard(part, mesh=mesh, ignored_params=whole)
    with bank.using():  # reads every parameter through its module, where an adapter in a parameter slot would speak
        fully_shard.state(model)._lazy_init()  # type: ignore[attr-defined]


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a model: the members of its outermost module lists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)
