"""Is this the base that the adapter was made on? Asked at every load."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from rankloom.core.attach import bank_of
from rankloom.core.bank import Bank
from rankloom.core.fingerprint import check_print, difference, fingerprint, short
from rankloom.errors import FileError, one_line
from rankloom.files.manifest import MANIFEST
from rankloom.formats.base import base_name
from rankloom.formats.manifest import Source
from rankloom.formats.view import View
from rankloom.store.base import Store

UnknownBase = Literal["warn", "refuse"]
LOG = logging.getLogger("rankloom")


def saved_print(view: View) -> dict[str, Any] | None:
    """The fingerprint to save with an adapter; None where the model is not its base as it is loaded (merged, layers
    replicated). Of a base that loading the adapter packs again in the same way: as it was before.
    """
    bank = bank_of(view.model)
    if bank.merged or any(plan.layer_replication for plan in bank.plans.values()):
        return None
    again = isinstance(view.plan.store, Store) and view.plan.start is None
    return bank.handed if again and bank.handed is not None else bank.original()


def check_base(
    source: Source,
    model: nn.Module,
    copy: View,
    unknown: UnknownBase,
    check: bool,
    after: Mapping[str, Any] | None = None,
) -> bool:
    """Refuse another base, by both fingerprints. `copy`: the adapter on a copy of the model, for what it replaces.
    `after`: of the base with the folder's folds in it; False if the model is that one already.

    A folder that has no fingerprint is a warning, or with `unknown="refuse"` refused; `check=False` logs that it was
    not asked.
    """
    if not check:
        LOG.warning("%s: loaded without a check of its base model (base_check=False)", source.folder)
        return True
    bank = getattr(model, "rankloom", None)
    replicated = isinstance(bank, Bank) and any(plan.layer_replication for plan in bank.plans.values())
    if source.base is None or replicated:
        _unknown(source, model, unknown)
        return True
    wrong = check_print(source.base)
    if wrong is not None:
        raise FileError(f"{source.folder / MANIFEST}: 'base' is no fingerprint: {wrong}")
    skip = {_name(site.path, site.slot) for site, _ in copy.whole}
    folded = after is not None and isinstance(bank, Bank) and bank.journal.base is not None
    now = bank.original() if folded else fingerprint(model)  # type: ignore[union-attr]
    if after is not None and not folded and difference(model, after, now, skip) is None:
        return False
    if isinstance(bank, Bank) and bank.handed is not None and now["packed"] != source.base["packed"]:
        now = bank.handed
    reason = difference(model, source.base, now, skip)
    if reason is not None:
        made = source.config.get("base_model_name_or_path")
        raise FileError(
            f"{source.folder / MANIFEST}: the adapter was made on another base model: {reason}. Its base: "
            f"{short(source.base)}{_called(made)}; this model: {short(now)}{_called(base_name(model))}. Load the right "
            "base, or pass base_check=False if this one is meant"
        )
    return True


def _unknown(source: Source, model: nn.Module, unknown: UnknownBase) -> None:
    """A folder without a fingerprint is judged by the base that its config names, where both it and the model do."""
    said, here = source.config.get("base_model_name_or_path"), base_name(model)
    words = f"{source.folder}: nothing says which weights the adapter was made on (no fingerprint of the base)"
    if isinstance(said, str) and said and here:
        if _last(said) == _last(here) and unknown == "warn":
            LOG.info("%s: no fingerprint of its base; its config names %s, as this model does", source.folder, said)
            return
        if _last(said) != _last(here):
            words = f"{source.folder}: its config names the base model {one_line(said)!r}, and this one is {here!r}"
    if unknown == "refuse":
        raise FileError(f"{words}; load it once in the library and save it anew, or pass unknown_base='warn'")
    warnings.warn(f"{words}; only names and shapes were compared", stacklevel=6)


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()


def _name(path: str, slot: str) -> str:
    return f"{path}.{slot}" if path else slot


def _called(name: object) -> str:
    return f" ({name})" if isinstance(name, str) and name else ""
