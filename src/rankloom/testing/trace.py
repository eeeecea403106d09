"""A snapshot of all that an adapter could leave behind, and what has changed since."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.store.base import stored_tensors

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
)

PLAIN = (bool, int, float, str, tuple)
Snapshot = dict[str, Any]


def snapshot(model: nn.Module) -> Snapshot:
    """Classes, attributes, children, hooks; tensors by identity, flag and value; the classes' own tables."""
    found: Snapshot = {"state_dict keys": tuple(model.state_dict())}
    classes: dict[type, None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        path = name or "the model"
        classes |= dict.fromkeys(type(module).__mro__[:-1])
        found[f"class of {path}"] = type(module)
        found |= {f"attribute {path}.{key}": value for key, value in module.__dict__.items()}
        found |= {f"{kind[1:]} of {path}": tuple(getattr(module, kind).values()) for kind in HOOKS}
        found |= {f"child {path}.{key}": child for key, child in module._modules.items()}
        for key, value in {**module._parameters, **module._buffers}.items():
            found |= dict(_tensor(f"{path}.{key}", value))
    for cls in classes:
        found |= {f"{cls.__module__}.{cls.__qualname__}.{key}": value for key, value in vars(cls).items()}
    return found | {f"torch.nn.functional.{key}": value for key, value in vars(torch.nn.functional).items()}


def _tensor(path: str, value: Tensor | None) -> Iterator[tuple[str, Any]]:
    yield f"the tensor object {path}", value
    if value is not None:
        yield f"requires_grad of {path}", value.requires_grad
        yield f"value of {path}", value.detach().clone()


def changes(before: Snapshot, now: Snapshot) -> list[str]:
    """What is new, gone or other, in words."""
    gone = [f"{key} is gone" for key in before if key not in now]
    new = [f"{key} is new" for key in now if key not in before]
    other = [
        f"{key} is {_shown(now[key])}, it was {_shown(value)}"
        for key, value in before.items()
        if key in now and not _same(value, now[key])
    ]
    return other + new + gone


def assert_unchanged(before: Snapshot, model: nn.Module, when: str) -> None:
    """Assert that nothing at all has changed since the snapshot."""
    found = changes(before, snapshot(model))
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    assert not found, f"{when}: {'; '.join(found[:3])}{more}"


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, nn.Module) or isinstance(b, nn.Module) or isinstance(a, nn.Parameter):
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and equal(a, b)
    return type(a) is type(b) and isinstance(a, PLAIN) and a == b


def equal(a: Tensor, b: Tensor) -> bool:
    """Bitwise equal in all that is held for them."""
    one, two = stored_tensors(a), stored_tensors(b)
    return len(one) == len(two) and all(map(torch.equal, one, two))


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')} tensor (sum {float(value.sum()):.6g})"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
