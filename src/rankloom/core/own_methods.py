"""Methods of a model that know nothing of its adapters: they say so when they are called."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from rankloom.core.bank import Bank
from rankloom.errors import StateError


class Told:
    """A method of the model, after `tell`, which warns or refuses."""

    def __init__(self, bank: Bank, method: str, tell: Callable[[Bank], None]) -> None:
        self.bank, self.method, self.tell = bank, method, tell

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.tell(self.bank)
        return getattr(type(self.bank.model), self.method)(self.bank.model, *args, **kwargs)


def _saving(bank: Bank) -> None:
    """A training that `RankloomCallback` drives is not told: the callback saves. Merged adapters are in the base."""
    left = [name for name in bank.names if name not in bank.merged]
    if left and not bank.driven:
        warnings.warn(
            f"save_pretrained saves the base model; of the adapters {', '.join(map(repr, left))} its files hold "
            "tensors that nothing reads: rankloom.save(model, folder, name) saves an adapter, bank.merge() puts it "
            "into the base",
            stacklevel=3,
        )


def _resizing(bank: Bank) -> None:
    """New embeddings take the place of the old ones, with whatever adapts those."""
    model: Any = bank.model
    replaced = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    for name in bank.names:
        on = next((site.name for site in bank.sites(name) if id(site.layer) in replaced), None)
        if on is not None:
            raise StateError(
                f"resize_token_embeddings puts a new module in the place of {on!r}, and adapter {name!r} is there: "
                "resize the model before you attach or load it (detach(model, name) takes it off)"
            )


TELLERS = {"save_pretrained": _saving, "resize_token_embeddings": _resizing}


def tell_in_own_methods(bank: Bank) -> None:
    """Have the model tell, where it has such methods."""
    for method, tell in TELLERS.items():
        if callable(getattr(type(bank.model), method, None)) and method not in vars(bank.model):
            vars(bank.model)[method] = Told(bank, method, tell)


def tell_no_more(model: nn.Module) -> None:
    """Undo that."""
    for method in TELLERS:
        if isinstance(vars(model).get(method), Told):
            del vars(model)[method]
