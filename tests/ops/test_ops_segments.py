"""Sorting a batch by adapter, and the passes over it, against one row at a time."""

import pytest
import torch

from rankloom.ops.segments import FEW, Segments, added, segments, stack, trained

K, D = 6, 5
BATCHES = {
    "in order": [0, 1, 2],
    "even, in order": [0, 0, 1, 1, 2, 2],
    "mixed": [1, 0, -1, 1, 2, 0, -1, 0],
    "one": [0, 0, 0],
    "skewed": [0, 0, 0, 0, 0, 0, 0, 1, 2, -1],
    "some of the rows": [-1, 0, 0, 1, 1, 2, 2],
}


def pairs(count=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    ranks = [2, 4, 1][:count]
    return [
        (torch.randn(r, K, generator=g, dtype=dtype), torch.randn(D, r, generator=g, dtype=dtype), 0.5 + i)
        for i, r in enumerate(ranks)
    ]


def one_by_one(y, x, which, held, times=1):
    out = y.clone()
    for row, adapter in enumerate(which):
        if adapter >= 0:
            a, b, s = held[adapter]
            part = slice(row * times, (row + 1) * times)
            out[part] = y[part] + s * (x[part] @ a.mT @ b.mT)
    return out


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_is_sorted(name):
    which = BATCHES[name]
    found = segments(which)
    assert [i for i, start, stop in found.runs for _ in range(stop - start)] == [i for i in which if i >= 0]
    assert all(which[start:stop] == [i] * (stop - start) for i, start, stop in found.runs)
    filled = range(found.slots.numel()) if found.filled is None else found.filled.tolist()
    flat = found.slots.flatten().tolist()
    assert sorted(flat[i] for i in filled) == [row for row, i in enumerate(which) if i >= 0]
    assert all(which[row] == i for i, own in enumerate(found.slots.tolist()) for row in own)
    assert (found.filled is None) == (flat == list(range(len(which))))


@pytest.mark.parametrize("shape", [(), (3,), (FEW + 1,), (2, 3)], ids=str)
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", BATCHES)
def test_every_way_through_equals_one_row_at_a_time(name, times, shape):
    which = BATCHES[name]
    held = pairs(max(which) + 1)
    x = torch.randn(len(which) * times, *shape, K, dtype=torch.float64)
    y = torch.randn(len(which) * times, *shape, D, dtype=torch.float64)
    wanted = one_by_one(y, x, which, held, times)
    made = added(y.clone(), x, segments(which), stack(held, torch.float64))
    torch.testing.assert_close(made, wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(trained(y, x, segments(which), held), wanted, rtol=1e-13, atol=1e-13)
    silent = [i for row, a in enumerate(which) if a < 0 for i in range(row * times, (row + 1) * times)]
    assert torch.equal(made[silent], y[silent])
    assert torch.equal(trained(y, x, segments(which), held)[silent], y[silent])


def test_an_output_that_does_not_lie_in_one_piece():
    which, held = BATCHES["mixed"], pairs()
    x, y = torch.randn(8, 3, K, dtype=torch.float64), torch.randn(3, 8, D, dtype=torch.float64).transpose(0, 1)
    wanted = one_by_one(y, x, which, held)
    torch.testing.assert_close(added(y, x, segments(which), stack(held, y.dtype)), wanted)
    torch.testing.assert_close(
        trained(y, x.transpose(0, 1).contiguous().transpose(0, 1), segments(which), held), wanted
    )


@pytest.mark.parametrize("name", BATCHES)
def test_gradients_are_those_of_the_plain_sum(name):
    which = BATCHES[name]
    held = pairs(max(which) + 1)
    leaves = [t.requires_grad_() for a, b, _ in held for t in (a, b)]
    x = torch.randn(len(which), 2, K, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(which), 2, D, dtype=torch.float64, requires_grad=True)
    up = torch.randn(len(which), 2, D, dtype=torch.float64)
    wanted = torch.autograd.grad(one_by_one(y, x, which, held), [x, y, *leaves], up)
    made = torch.autograd.grad(trained(y, x, segments(which), held), [x, y, *leaves], up)
    for a, b in zip(made, wanted):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_gradients_by_finite_differences_and_only_where_they_are_wanted():
    held = pairs(2)
    held[0][0].requires_grad_()
    held[1][1].requires_grad_()
    x, y = torch.randn(4, K, dtype=torch.float64, requires_grad=True), torch.randn(4, D, dtype=torch.float64)
    found = segments([1, 0, -1, 1])

    def run(x, a, b):
        return trained(y, x, found, [(a, held[0][1], 0.5), (held[1][0], b, 1.5)])

    assert torch.autograd.gradcheck(run, (x, held[0][0], held[1][1]))
    trained(y, x, found, held).sum().backward()
    assert held[0][1].grad is None
    assert held[1][0].grad is None


def test_mixed_dtypes_sum_in_the_output_and_keep_gradients_in_the_factors():
    held = pairs(dtype=torch.float32)
    leaves = [t.requires_grad_() for a, b, _ in held for t in (a, b)]
    which = BATCHES["mixed"]
    x, y = torch.randn(8, 4, K).bfloat16(), torch.randn(8, 4, D).bfloat16()
    made = trained(y, x, segments(which), held)
    assert made.dtype == torch.bfloat16
    made.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)
    wanted = one_by_one(y.double(), x.double(), which, [(a.double(), b.double(), s) for a, b, s in held])
    assert float((made.double() - wanted).abs().max().detach() / wanted.abs().max().detach()) < 2e-2


def test_a_stack_pads_smaller_ranks_by_zeros():
    held = stack(pairs(), torch.float32)
    assert held.a.shape == (3, 4, K)
    assert held.b.shape == (3, 4, D)
    assert held.ranks == (2, 4, 1)
    for i, r in enumerate(held.ranks):
        assert not held.a[i, r:].any()
        assert not held.b[i, r:].any()


def test_a_part_of_the_adapters_is_sorted_once():
    found = segments([0, 2, -1, 1, 2])
    assert found.only((0, 1, 2)) is found
    part = found.only((0, 2))
    assert isinstance(part, Segments)
    assert part.which == (0, 1, -1, -1, 1)
    assert found.only((0, 2)) is part
