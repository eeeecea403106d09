"""The order of products: every order gives the same numbers, takes the operations that are told, and the cheapest wins."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rankloom.ops import fused as under
from rankloom.ops.fused import Change, Layer, fused
from rankloom.ops.order import Order, cheapest, operations

TOKENS, IN = 24, 10
OUT, RANKS = (7, 4), (3, 5)


def layers(dtype=torch.float64, dropout=0.0, dora=False, frozen=""):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)

    made = []
    for out, r in zip(OUT, RANKS):
        a, b = random(r, IN).requires_grad_(frozen != "A"), random(out, r).requires_grad_(frozen != "B")
        weight, bias = random(out, IN), random(out)
        square = weight.square().sum(1) if dora else None
        magnitude = random(out).requires_grad_() if dora else None
        change = Change(a, b, 0.5, dropout)
        made.append(Layer(weight, lambda w: w, bias, (change,), None, magnitude, square))
    return made


def run(made, dx=True, dtype=torch.float64):
    """Outputs, gradients of the input and of every factor."""
    x = torch.randn(2, TOKENS // 2, IN, generator=torch.Generator().manual_seed(1), dtype=dtype, requires_grad=dx)
    ys = fused(x, made, None, dtype)
    trained = [t for m in made for t in (*m.changes[0][:2], m.magnitude) if t is not None and t.requires_grad]
    grads = torch.autograd.grad(sum(y.sin().sum() for y in ys), [*([x] if dx else []), *trained])
    return [*ys, *grads]


def forced(monkeypatch, order):
    monkeypatch.setattr(under, "cheapest", lambda *_: order)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dx", [False, True])
@pytest.mark.parametrize("order", [Order.MERGED, Order.DENSE])
def test_every_order_gives_the_same(monkeypatch, order, dx, dora):
    made, found = layers(dora=dora), {}
    for each in (Order.THIN, order):
        forced(monkeypatch, each)
        found[each] = run(made, dx)
    for expected, got in zip(*found.values()):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dx", [False, True])
@pytest.mark.parametrize("order", Order)
def test_the_operations_are_those_counted(monkeypatch, order, dx):
    forced(monkeypatch, order)
    with FlopCounterMode(display=False) as counter:
        run(layers(), dx)
    base = sum(2 * TOKENS * out * IN * (1 + dx) for out in OUT)
    told = sum(operations(order, TOKENS, (out, IN), r, dx) for out, r in zip(OUT, RANKS))
    assert counter.get_total_flops() == base + told


def test_the_cheapest_has_the_fewest_operations_but_for_what_it_writes():
    """Few tokens or low ranks stay thin; many tokens merge; high ranks too take the dense gradients."""
    shape, seen = (768, 768), set()
    for tokens, r, dx in itertools.product((256, 1024, 4096, 16384), (1, 16, 64, 256, 768), (False, True)):
        chosen = cheapest(tokens, ((shape, r),) * 3, dx)
        counts = {order: operations(order, tokens, shape, r, dx) for order in Order}
        assert counts[chosen] <= counts[Order.THIN]
        assert min(counts.values()) >= counts[chosen] - 128 * 4 * 768 * 768
        seen.add(chosen)
    assert seen == set(Order)
    assert cheapest(1024, ((shape, 16),), True) is Order.THIN
    assert cheapest(4096, ((shape, 128),), True) is Order.MERGED
    assert cheapest(4096, ((shape, 512),), True) is Order.DENSE


def test_the_cheapest_is_taken():
    """Many tokens and a high rank, nothing forced: the operations are those of the dense order."""
    tokens, side, r = 4096, 16, 12
    a, b = torch.randn(r, side, requires_grad=True), torch.randn(side, r, requires_grad=True)
    x, weight = torch.randn(tokens, side, requires_grad=True), torch.randn(side, side)
    order = cheapest(tokens, (((side, side), r),), True)
    with FlopCounterMode(display=False) as counter:
        fused(x, [Layer(weight, None, None, (Change(a, b),))], None, torch.float32)[0].sum().backward()
    assert order is Order.DENSE
    assert counter.get_total_flops() == 4 * tokens * side * side + operations(order, tokens, (side, side), r, True)


@pytest.mark.parametrize(
    ("made", "dtype"),
    [
        (lambda: layers(dropout=0.1), torch.float64),
        (lambda: layers(frozen="A"), torch.float64),
        (lambda: layers(frozen="B"), torch.float64),
        (lambda: layers(torch.bfloat16), torch.bfloat16),
    ],
    ids=["dropout", "frozen_A", "frozen_B", "bf16"],
)
def test_where_another_order_would_say_something_else_it_is_not_asked_for(monkeypatch, made, dtype):
    def asked(*_):
        raise AssertionError("asked for the cheapest order")

    monkeypatch.setattr(under, "cheapest", asked)
    run(made(), dtype=dtype)
