"""A model with a `save_pretrained` of its own says, when that is called, that adapters are not saved by it."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from rankloom.core.bank import Bank

METHOD = "save_pretrained"


class Telling:
    """The model's own method, after a warning that names the adapters which no other library will find in its files.

    A training that `RankloomCallback` drives is not told: the callback saves them. Merged ones are in the base.
    """

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bank = self.bank
        left = [name for name in bank.names if name not in bank.merged]
        if left and not bank.driven:
            warnings.warn(
                f"save_pretrained saves the base model; of the adapters {', '.join(map(repr, left))} its files hold "
                "tensors that nothing reads: rankloom.save(model, folder, name) saves an adapter, bank.merge() puts it "
                "into the base",
                stacklevel=2,
            )
        return getattr(type(bank.model), METHOD)(bank.model, *args, **kwargs)


def tell_of_own_saving(bank: Bank) -> None:
    """Have the model tell, if it saves itself."""
    if callable(getattr(type(bank.model), METHOD, None)) and METHOD not in vars(bank.model):
        vars(bank.model)[METHOD] = Telling(bank)


def tell_no_more(model: nn.Module) -> None:
    """Undo that."""
    if isinstance(vars(model).get(METHOD), Telling):
        del vars(model)[METHOD]
