"""Gradients of the trained tensors for each example of a batch by itself, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

from rankloom.errors import SettingsError
from rankloom.train.loss import Loss, default_loss
from rankloom.train.modes import bank_or_none
from rankloom.train.run import trainable


def per_example_gradients(model: nn.Module, batch: Any, loss: Loss = default_loss) -> dict[str, Tensor]:
    """{key of a trained tensor: its gradient (batch, *shape) for each example}, the base frozen.

    What differentially private training clips (Abadi et al., CCS 2016, arXiv 1607.00133) and influence measures read.

    Args:
        model: with adapters, of which the trained ones are differentiated; without, every parameter that requires
            a gradient. Dropout draws a mask for each example.
        batch: its tensors have the examples in their first dim, the same number in each.
        loss: of one example, as a batch of one; by default that of `rankloom.fit`.

    Raises:
        SettingsError: the tensors of the batch do not agree on the number of examples, or the model branches on values.
    """
    chosen = trainable(model)
    names = {id(p): name for name, p in model.named_parameters()}
    keys = {names[id(p)]: key for key, p in chosen.items()}
    values = {name: p.detach() for name, p in model.named_parameters() if name in keys}
    examples = _examples(batch)
    bank = bank_or_none(model)
    fused = bank is not None and bank.selector.fused

    def of_one(tensors: Mapping[str, Tensor], example: Any) -> Tensor:
        alone = tree_map(lambda t: t.unsqueeze(0) if isinstance(t, Tensor) else t, example)
        return functional_loss(model, tensors, alone, loss)

    dims = tree_map(lambda t: 0 if isinstance(t, Tensor) else None, batch)
    each: Callable[..., dict[str, Tensor]] = vmap(grad(of_one), in_dims=(None, dims), randomness="different")
    if bank is not None:
        bank.selector.fused = False
    try:
        found = each(values, batch)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise SettingsError(
            f"this {type(model).__name__} does what depends on values of the batch, which torch.func cannot vectorise "
            "over examples: a model of transformers wants model.set_attn_implementation('eager')"
        ) from error
    finally:
        if bank is not None:
            bank.selector.fused = fused
    assert all(len(gradient) == examples for gradient in found.values())
    return {keys[name]: gradient for name, gradient in found.items()}


def functional_loss(model: nn.Module, tensors: Mapping[str, Tensor], batch: Any, loss: Loss) -> Tensor:
    """The loss with `tensors` in the place of the model's parameters of these names; the model stays as it is."""
    found: Tensor = functional_call(_Losing(model, loss), {f"model.{name}": t for name, t in tensors.items()}, (batch,))
    return found


class _Losing(nn.Module):
    """The loss of a model as a module, which `functional_call` wants."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def _examples(batch: Any) -> int:
    sizes: set[int] = set()
    tree_map(lambda t: sizes.add(t.shape[0] if t.ndim else 0) if isinstance(t, Tensor) else None, batch)
    if len(sizes) != 1 or sizes == {0}:
        raise SettingsError(
            f"per-example gradients need the examples in the first dim of every tensor of the batch; the sizes are "
            f"{sorted(sizes) or 'none, there is no tensor'}"
        )
    return sizes.pop()
