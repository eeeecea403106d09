"""Mixed batches: many adapters in one pass, what it costs, and several adapters trained at once."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from core_tiny import difference, llama, nudge, tokens, tower, words
from torch.utils._python_dispatch import TorchDispatchMode

import rankloom as rl
from rankloom.core import choosing, packing, slots
from rankloom.core.adapter import Adapter

NAMES = ["q_proj", "v_proj"]


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def many(count, model=None, ranks=(2, 5, 1), targets=NAMES):
    """`count` shaken LoRAs of different ranks and scales on one base."""
    model = model or tower()
    for i in range(count):
        bank = rl.attach(model, rl.LoRA(r=ranks[i % len(ranks)], lora_alpha=3 + i), f"n{i}", target_modules=targets)
        nudge(bank, f"n{i}", seed=i)
    return model, bank


def alone(model, bank, ids, rows):
    out = []
    for row, name in zip(ids, rows):
        with bank.using(*[name] if name else []):
            out.append(model(row[None])[0])
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 5, 20])
@pytest.mark.parametrize(
    "rows",
    [
        ["n0", "n1", "n2", "n3"],
        ["n2", "n2", "n0", "n0"],
        ["n3", None, "n3", "n1"],
        ["n0", "n0", "n0", "n1"],
        [None, None, "n2", None],
        [None] * 4,
    ],
)
def test_each_row_hears_its_own_adapter(rows, length):
    model, bank = many(4)
    ids = words(batch=4, tokens=length)
    expected = alone(model, bank, ids, rows)
    with bank.using():
        base = model(ids)
    with bank.using(rows=rows):
        out = model(ids)
    assert difference(out, expected) < 1e-12
    for i, name in enumerate(rows):
        assert torch.equal(out[i], base[i]) == (name is None)


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 16])
@pytest.mark.parametrize("length", [1, 12])
def test_operations_do_not_grow_with_the_adapters_where_the_batch_is_even(count, length):
    model, bank = many(count)
    ids = words(batch=count, tokens=length)
    with bank.using():
        model(ids)
        with Operations() as base:
            model(ids)
    with bank.using(rows=list(bank.names)):
        model(ids)
        with Operations() as seen:
            model(ids)
    extra = seen.counts - base.counts
    assert extra["bmm"] == extra["baddbmm_"] == 4
    assert sum(extra.values()) <= 4 * 12


@torch.no_grad()
def test_a_batch_is_sorted_once_and_not_in_every_layer(monkeypatch):
    model, bank = many(4, model=tower(depth=5))
    sorts = []
    real = choosing.segments
    monkeypatch.setattr(choosing, "segments", lambda which: (sorts.append(which), real(which))[1])
    with bank.using(rows=["n3", None, "n0", "n3"]):
        for _ in range(3):
            model(words(batch=4))
    assert sorts == [[0, -1, 1, 0]]


@torch.no_grad()
def test_stacks_are_kept_until_a_factor_changes(monkeypatch):
    made = []
    real = packing.stack
    monkeypatch.setattr(packing, "stack", lambda *a: (made.append(a), real(*a))[1])
    model, bank = many(3)
    ids, rows = words(batch=3), ["n0", "n1", "n2"]

    def fresh():
        """How many stacks this pass makes; its output is that of one row at a time."""
        made.clear()
        with bank.using(rows=rows):
            out = model(ids)
        count = len(made)
        assert difference(out, alone(model, bank, ids, rows)) < 1e-12
        return count

    assert fresh() == 4
    assert fresh() == 0
    first = next(a for _, a in bank.adapters("n1"))
    first.B.mul_(2)
    assert fresh() == 1
    first.A = torch.nn.Parameter(torch.randn(4, 8, dtype=torch.float64))
    first.B = torch.nn.Parameter(torch.randn(8, 4, dtype=torch.float64))
    assert fresh() == 1
    first.scaling = 0.25
    assert fresh() == 1
    first.A.data = torch.randn(4, 8, dtype=torch.float64)
    assert fresh() == 1
    bank.reset("n2")
    assert fresh() == 4
    assert fresh() == 0


@torch.no_grad()
def test_adapters_at_different_layers_and_of_other_methods_in_one_batch():
    model = tower()
    bank = rl.attach(model, rl.LoRA(r=2), "a", target_modules=NAMES)
    rl.attach(model, rl.LoRA(r=3, lora_bias=True), "biased", target_modules=["q_proj"])
    rl.attach(model, rl.DoRA(rl.LoRA(r=2)), "dora", target_modules=["v_proj", "head"])
    rl.attach(model, rl.LoRA(r=4), "top", target_modules=["head", "embed", "layers.1.q_proj"])
    nudge(bank)
    rows = ["dora", "a", None, "top", "biased", "a"]
    ids = words(batch=6)
    expected = alone(model, bank, ids, rows)
    with bank.using(rows=rows):
        assert difference(model(ids), expected) < 1e-12


KINDS = {
    "dora": rl.DoRA(rl.LoRA(r=2)),
    "dora_bias": rl.DoRA(rl.LoRA(r=3, lora_bias=True)),
    "bias": rl.LoRA(r=2, lora_bias=True),
    "vera": rl.VeRA(r=3),
    "adalora": rl.AdaLoRA(init_r=3, target_r=2),
    "dylora": rl.DyLoRA(r=4),
    "pissa": rl.LoRA(r=2, init_lora_weights="pissa"),
    "hydralora": rl.hydralora(r=2, n_b=2),
}


def zoo(dtype=torch.float64):
    model = tower().to(dtype)
    for i, (name, method) in enumerate(KINDS.items()):
        bank = rl.attach(model, method, name, target_modules=NAMES)
        nudge(bank, name, seed=i)
    return model, bank


@pytest.mark.parametrize("length", [1, 12])
def test_every_thin_form_in_one_batch(length, monkeypatch):
    """DoRA, biases, vectors, nested and borrowed tensors: rows as alone, in a pass for all but what routes tokens."""
    model, bank = zoo()
    rows = [*KINDS, None, "dora"]
    ids = words(batch=len(rows), tokens=length)
    with torch.no_grad():
        expected = alone(model, bank, ids, rows)
        one_by_one = []
        monkeypatch.setattr(Adapter, "add", lambda self, *a: (one_by_one.append(type(self).__name__), add(self, *a))[1])
        with bank.using(rows=rows):
            assert difference(model(ids), expected) < 1e-12
    assert set(one_by_one) == {"MixtureAdapter"}


add = Adapter.add


def test_every_thin_form_trains_in_one_batch():
    model, bank = zoo()
    rows = [*KINDS, None, "dora"]
    ids = words(batch=len(rows), tokens=5)
    parameters = [p for n in bank.names for _, p, _ in bank.trainable(n)]
    with bank.using(rows=rows):
        found = torch.autograd.grad(model(ids).sin().sum(), parameters, allow_unused=True)
    expected = torch.autograd.grad(alone(model, bank, ids, rows).sin().sum(), parameters, allow_unused=True)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)  # the router is float32


@torch.no_grad()
@pytest.mark.parametrize("write", ["nested", "borrowed", "setting", "nested_setting", "base"])
def test_a_stack_sees_every_change(write):
    """What is nested, borrowed, set or multiplied by: the next pass, of rows and of all, is right."""
    model, bank = zoo()
    rows = list(KINDS)
    ids = words(batch=len(rows))

    def right():
        expected = torch.stack([fresh(model, ids[i : i + 1], name)[0] for i, name in enumerate(rows)])
        with bank.using(rows=rows):
            assert difference(model(ids), expected) < 1e-12
        return expected

    before = right()
    layer = model.layers[0].q_proj
    table = layer.adapters["layer"]
    if write == "nested":
        table["dora"].inner.B.mul_(2)
    elif write == "borrowed":
        table["vera"].A.mul_(2)
    elif write == "setting":
        table["dylora"].rank = 2
    elif write == "nested_setting":
        table["dora"].inner.scaling = 0.1
    else:
        layer._parameters["weight"].mul_(2)
    assert difference(right(), before) > 1e-6


def fresh(model, ids, name):
    """The output of a copy, which has no stacks."""
    other = copy.deepcopy(model)
    other.rankloom.use(name)
    return other(ids)


@pytest.mark.parametrize("rows", [["n0", "n1", "n2", None], ["n1", "n0", "n1", "n2"]])
def test_adapters_trained_together_learn_as_each_alone(rows):
    ids, target = words(batch=4, tokens=6), torch.randn(4, 6, 11, dtype=torch.float64)
    together, bank = many(3)
    steps = {"together": [], "alone": []}

    def step(bank, params, rows, at):
        optimizer = torch.optim.AdamW(params, lr=0.05)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            with bank.using(rows=rows):
                loss = ((bank.model(ids[at]) - target[at]) ** 2).sum((1, 2))
                loss.sum().backward()
            losses.append(loss.detach())
            optimizer.step()
        return torch.stack(losses)

    params = [p for n in bank.names for _, p, _ in bank.tensors(n)]
    steps["together"] = step(bank, params, rows, list(range(4)))
    for name in bank.names:
        at = [i for i, r in enumerate(rows) if r == name]
        _, own = many(3)
        found = step(own, [p for _, p, _ in own.tensors(name)], [name] * len(at), at)
        torch.testing.assert_close(steps["together"][:, at], found, rtol=1e-10, atol=1e-10)
        pairs = zip(bank.tensors(name), own.tensors(name))
        for (key, p, _), (_, q, _) in pairs:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-10, msg=key)
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)


def test_training_takes_the_same_path(monkeypatch):
    model, bank = many(3)
    monkeypatch.setattr(Adapter, "add", lambda *_: pytest.fail("an adapter spoke by itself"))
    with bank.using(rows=["n2", "n0", None]):
        model(words(batch=3)).sum().backward()
    assert all(p.grad is not None for n in ("n0", "n2") for _, p, _ in bank.tensors(n))
    assert all(p.grad is None for _, p, _ in bank.tensors("n1"))


def test_dropout_speaks_row_by_row():
    model = tower().train()
    for name in ("a", "b"):
        bank = rl.attach(model, rl.LoRA(r=2, lora_dropout=0.5), name, target_modules=NAMES)
    nudge(bank)
    ids = words(batch=2)
    with bank.using(rows=["a", "b"]):
        assert difference(model(ids), model(ids)) > 1e-3
        model.eval()
        assert difference(model(ids), alone(model, bank, ids, ["a", "b"])) < 1e-12


@torch.no_grad()
def test_a_detached_adapter_leaves_the_batch():
    model, bank = many(3)
    ids = words(batch=3)
    bank.use(rows=["n0", "n1", "n2"])
    model(ids)
    rl.detach(model, "n1")
    out = model(ids)
    assert difference(out, alone(model, bank, ids, ["n0", None, "n2"])) < 1e-12


@torch.no_grad()
def test_copies_and_pickles_carry_no_stacks():
    model, bank = many(2)
    ids, rows = words(batch=2), ["n1", "n0"]
    bank.use(rows=rows)
    out = model(ids)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        anchor = again.layers[0].q_proj.__dict__["_rankloom"]
        assert isinstance(anchor, slots.Anchor)
        assert anchor.stacks._last is None
        assert torch.equal(again(ids), out)


@torch.no_grad()
def test_half_precision_bases_hear_float32_adapters():
    model = llama().bfloat16()
    for i in range(3):
        bank = rl.attach(model, rl.LoRA(r=2), f"n{i}", target_modules="all-linear")
        nudge(bank, f"n{i}", seed=i, size=0.1)
    ids, rows = tokens(batch=3), ["n2", "n0", "n1"]
    expected = torch.cat([_logits(model, bank, ids[i : i + 1], name) for i, name in enumerate(rows)])
    with bank.using(rows=rows):
        out = model(ids).logits
    assert out.dtype == torch.bfloat16
    assert difference(out.float(), expected.float()) < 5e-2


def _logits(model, bank, ids, name):
    with bank.using(name):
        return model(ids).logits


def test_a_pass_without_gradients_leaves_the_next_one_its_own():
    """Factors that are computed (a prefix of ranks) are stacked once for evaluation, and afresh where they train."""
    model = tower()
    bank = rl.attach(model, rl.DyLoRA(r=3), "a", target_modules=NAMES)
    nudge(bank, "a")
    ids = words(2)
    with bank.using(rows=["a", None]):
        with torch.no_grad():
            model(ids)
        for _ in range(2):
            model(ids).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for _, p, _ in bank.trainable("a"))
