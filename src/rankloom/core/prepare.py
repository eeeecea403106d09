"""The base as a plan keeps it: linear weights in the plan's store, and what the plan's start makes of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from rankloom.core.bank import Bank
from rankloom.core.plan import Plan
from rankloom.core.slots import changed
from rankloom.core.start import Calibration, Evidence
from rankloom.core.targets import base_modules, below, leaves, linear_layers, matches
from rankloom.errors import SettingsError, StateError, TargetError, suggest
from rankloom.store.base import Keeping, Packed, Store, is_plain
from rankloom.store.model import frozen, keep


def kept_layers(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """The layers whose weights the plan's store keeps, by name: every linear layer but the output head, those below
    `modules_to_save` and `store_skip_modules`. Raises `StateError` for a weight that is kept another way already.
    """
    if plan.store is None:
        return {}
    names = [name for name, _ in base_modules(model)]
    for wanted in plan.store_skip_modules:
        if not any(matches((wanted,), name) for name in names):
            raise TargetError(
                f"store_skip_modules: {wanted!r} matches nothing in the model{suggest(wanted, leaves(names))}"
            )
    skipped = (*plan.modules_to_save, *plan.store_skip_modules)
    found = {name: layer for name, layer in linear_layers(model).items() if not below(skipped, name)}
    for name, layer in found.items():
        _check(name, frozen(layer, "weight"), plan.store)
    return found


def keep_base(model: nn.Module, plan: Plan, evidence: Evidence | None = None, r: int = 0) -> list[str]:
    """Pack the weights of `kept_layers` in place, each in the store that the plan chooses; those packed already stay.

    `r`: rank that the adapter takes off a weight, for stores chosen by what is left. Returns the layers' names.
    """
    stores = choose(model, plan, evidence or Evidence(), r)
    keep(model, {f"{name}.weight": store for name, store in stores.items()})
    for name in stores:
        changed(model.get_submodule(name))
    return list(stores)


def prepare(bank: Bank, name: str, calibration: Calibration | None = None) -> list[str]:
    """Bring the base to what the plan of `name` says, and the adapter to its start on it; the layers that were packed.

    On the meta device only the form changes. Raises before anything is packed if the start cannot fill these adapters,
    or lacks its data.
    """
    model, plan = bank.model, bank.plans[name]
    r = plan.start.check(bank, name) if plan.start is not None else 0
    layers = kept_layers(model, plan)
    if plan.start is None or any(frozen(layer, "weight").is_meta for layer in layers.values()):
        packed = keep_base(model, plan, r=r)
        bank.reset(name)
        return packed
    evidence = _evidence(bank, plan, layers, calibration)
    stores = choose(model, plan, evidence, r)
    bank.reset(name)
    bank.started[name] = plan.start.apply(bank, name, stores, evidence)
    left = {n: s for n, s in stores.items() if n not in bank.started[name]}
    keep(model, {f"{n}.weight": s for n, s in left.items()})
    return list(stores)


def choose(model: nn.Module, plan: Plan, evidence: Evidence, r: int) -> dict[str, Store]:
    """The store of each layer that is still to be packed. Raises `SettingsError` for a weight that does not fit it."""
    every = {name: frozen(layer, "weight") for name, layer in kept_layers(model, plan).items()}
    weights = {name: weight for name, weight in every.items() if not isinstance(weight, Packed)}
    if plan.store is None or not weights:
        return {}
    stores = dict(plan.store.choose(weights, evidence.fisher, r))
    for name, store in stores.items():
        try:
            store.encode(weights[name].to("meta"))
        except SettingsError as error:
            raise SettingsError(f"layer {name!r}: {error}; skip it by store_skip_modules") from None
    return stores


def _evidence(bank: Bank, plan: Plan, layers: Mapping[str, nn.Module], calibration: Calibration | None) -> Evidence:
    assert plan.start is not None
    if not plan.start.calibrated:
        return Evidence()
    if calibration is None:
        raise SettingsError(
            f"start={plan.start} looks at data: attach(…, calibration=[batch, …]) with batches of keyword arguments "
            "for the model, a few rows each"
        )
    with bank.using():
        return plan.start.gather(bank.model, layers, calibration)


def _check(name: str, weight: Tensor, store: Keeping) -> None:
    if isinstance(weight, Packed):
        if isinstance(store, Store) and weight.store != store:
            raise StateError(
                f"the weight of {name!r} is kept as {weight.store}, and the plan says {store}: load the base anew"
            )
    elif not is_plain(weight):
        raise StateError(
            f"the weight of {name!r} is a {type(weight).__name__} of dtype {weight.dtype}, quantised already: leave "
            "the plan's store out, or load the base in float32, bfloat16 or float16"
        )
