"""Two caches of one generation: that of the adapted model, and beside it that of the base alone.

A first pass of the base over the new token needs the base's own keys and values of the tokens before. They stay in a
second cache that the first one carries with it, and every operation on the first is done on the second.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from rankloom.errors import StateError

_BESIDE = "rankloom_base_cache"
_BOTH = ("batch_repeat_interleave", "batch_select_indices", "crop", "reorder_cache", "reset")
"""Operations on a cache (transformers) that move or drop what is in it."""


def beside(held: Any) -> Any:
    """The base's cache beside `held`; made where `held` is still empty.

    Raises `StateError` where `held` has tokens that the base did not see.
    """
    found = held.__dict__.get(_BESIDE)
    ours, theirs = int(held.get_seq_length()), 0 if found is None else int(found.get_seq_length())
    if ours != theirs:
        raise StateError(
            f"the cache has {ours} tokens, and the first pass of this adapter has seen {theirs} of them: begin with an "
            "empty cache while the adapter is active"
        )
    return pair(held, copy.deepcopy(held)) if found is None else found


def pair(held: Any, base: Any) -> Any:
    """Let `held` carry `base` with it."""
    if _BESIDE not in held.__dict__:
        cls: Any = type(held)
        held.__class__ = _pairs(cls)
    held.__dict__[_BESIDE] = base
    return base


def caches(values: Mapping[str, Any]) -> dict[str, Any]:
    """The caches among arguments or outputs, by name: whatever tells how many tokens it holds."""
    return {name: value for name, value in values.items() if hasattr(value, "get_seq_length")}


@cache
def _pairs(cls: type) -> type:
    body = {name: _both(getattr(cls, name)) for name in _BOTH if hasattr(cls, name)}
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, **body})


def _both(own: Callable[..., Any]) -> Callable[..., Any]:
    def both(self: Any, *args: Any, **kwargs: Any) -> Any:
        getattr(self.__dict__[_BESIDE], own.__name__)(*args, **kwargs)
        return own(self, *args, **kwargs)

    return both
