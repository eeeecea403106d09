"""DyLoRA (arXiv 2210.07558): one pair for every rank, trained by sampling the rank."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from number_tools import Net, count, drive, linear, nudge, only, stage
from torch import nn

import rankloom as rl
from rankloom.errors import SettingsError
from rankloom.methods.dylora import DyLoRA, set_rank, truncate
from rankloom.rules.sampling import RankSampling, inverse, probabilities


def _dylora(model=None, **settings):
    model = model or linear()
    bank = rl.attach(model, DyLoRA(**{"r": 4, "lora_alpha": 6.0, **settings}))
    return model, bank, only(bank)


def _train(model, bank, steps, lr=0.05, optimizer=torch.optim.AdamW, watch=None, x=None, target=None, **settings):
    x = torch.randn(16, 6).double() if x is None else x
    target = torch.randn(16, 5).double() if target is None else target
    run = stage(model, steps, optimizer([p for _, p, _ in bank.trainable()], lr=lr, **settings))

    def loss():
        if watch is not None:
            watch()
        return (model(x) - target).square().mean()

    return drive(run, bank.plans["default"].method.rules(), loss)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_gradients_of_the_drawn_rank(frozen, rank):
    """Must hold: frozen, exactly one row of A and one column of B have a gradient; else the rows up to the rank."""
    model, bank, adapter = _dylora(frozen=frozen)
    nudge(bank)
    adapter.sample(rank)
    model(torch.randn(7, 6).double()).square().sum().backward()
    want = [frozen is False or i == rank - 1 for i in range(rank)] + [False] * (4 - rank)
    assert adapter.A.grad.any(1).tolist() == want
    assert adapter.B.grad.any(0).tolist() == want


def test_frozen_gradient_by_hand():
    """Mechanism: with rows below b in the forward but out of the graph: ∂B_b = s g (A_b x)ᵀ, s = alpha/b."""
    model, bank, adapter = _dylora()
    nudge(bank)
    adapter.sample(3)
    x, g = torch.randn(1, 6).double(), torch.randn(1, 5).double()
    y = model(x)
    y.backward(g)
    a, b = adapter.A.detach(), adapter.B.detach()
    assert torch.allclose(y, x @ model.fc.weight.T + model.fc.bias + 2.0 * x @ a[:3].T @ b[:, :3].T)
    assert torch.allclose(adapter.B.grad[:, 2], 2.0 * g[0] * (a[2] @ x[0]))
    assert torch.allclose(adapter.A.grad[2], 2.0 * (g[0] @ b[:, 2]) * x[0])


@pytest.mark.parametrize(
    ("scaling", "scale"),
    [("alpha/b", lambda b: 6 / b), ("alpha/sqrt(rb)", lambda b: 6 / math.sqrt(4 * b)), ("alpha/r", lambda b: 6 / 4)],
)
def test_scale_at_each_rank(scaling, scale):
    """Must hold: the scale is alpha/b exactly, and the two other rules as named; evaluated at any rank; delta agrees."""
    model, bank, adapter = _dylora(scaling=scaling)
    nudge(bank)
    x = torch.randn(3, 6).double()
    with bank.using():
        silent = model(x)
    for b in (1, 2, 3, 4):
        set_rank(bank, b)
        assert adapter.scaling == scale(b)
        change = scale(b) * adapter.B[:, :b] @ adapter.A[:b]
        assert torch.allclose(bank.delta("default")["fc"], change, rtol=1e-12)
        assert torch.allclose(model(x) - silent, x @ change.T, atol=1e-12)


@pytest.mark.parametrize("scaling", ["alpha/b", "alpha/sqrt(rb)", "alpha/r"])
@pytest.mark.parametrize("b", [1, 3, 4])
def test_truncate_equals_set_rank(scaling, b):
    """Must hold: truncate(b), then evaluate, equals set_rank(b), at b and at every rank below; the plan builds the short one."""
    model, bank, _ = _dylora(scaling=scaling)
    nudge(bank)
    x = torch.randn(3, 6).double()
    outputs = []
    for rank in range(1, b + 1):
        set_rank(bank, rank)
        outputs.append(model(x))
    truncate(bank, b)
    adapter = only(bank)
    assert (adapter.A.shape, adapter.B.shape) == ((b, 6), (5, b))
    assert torch.allclose(model(x), outputs[-1], rtol=1e-12)
    for rank in range(1, b + 1):
        set_rank(bank, rank)
        assert torch.allclose(model(x), outputs[rank - 1], rtol=1e-12)
    fresh = linear()
    fresh.fc.load_state_dict({k: v for k, v in model.fc.state_dict().items() if "adapters" not in k})
    rl.attach(fresh, bank.plans["default"])
    only(fresh.rankloom).load_state_dict(adapter.state_dict())
    assert torch.allclose(fresh(x), outputs[-1], rtol=1e-12)


def test_truncate_inside_a_combinator():
    """The plan of DoRA around DyLoRA is shortened too, alpha patterns included."""
    model = Net(p=nn.Linear(6, 5), q=nn.Linear(6, 5))
    method = rl.DoRA(DyLoRA(r=4, scaling="alpha/r", rank_distribution=(0.1, 0.2, 0.3, 0.4)))
    bank = rl.attach(model, method, alpha_pattern={"q": 8.0})
    nudge(bank)
    set_rank(bank, 2)
    x = torch.randn(3, 6)
    before = model(x)
    truncate(bank, 2)
    assert torch.allclose(model(x), before, atol=1e-6)
    plan = bank.plans["default"]
    assert (plan.method.inner.r, plan.method.inner.lora_alpha, plan.alpha_pattern) == (2, 8.0, {"q": 4.0})


def _twins(**settings):
    """DyLoRA and LoRA of rank 4 with the same start."""
    torch.manual_seed(2)
    model, bank, adapter = _dylora(**settings)
    torch.manual_seed(2)
    other = linear()
    plain = rl.attach(other, rl.LoRA(r=4, lora_alpha=6.0))
    assert torch.equal(adapter.A, only(plain).A)
    return model, bank, other, plain


def test_always_the_largest_rank_is_lora():
    """Must hold: b = r_max always, unfrozen, equals LoRA through a training, bit for bit."""
    model, bank, other, plain = _twins(frozen=False, rank_distribution=(0.0, 0.0, 0.0, 1.0))
    torch.manual_seed(3)
    mine = _train(model, bank, 12)
    torch.manual_seed(3)
    theirs = _train(other, plain, 12)
    assert mine == theirs
    assert torch.equal(only(bank).A, only(plain).A)
    assert torch.equal(only(bank).B, only(plain).B)
    x = torch.randn(3, 6).double()
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [(torch.optim.AdamW, {"weight_decay": 0.3}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.RMSprop, {})],
)
def test_momentum_moves_nothing_else(frozen, optimizer, settings):
    """Must hold: momentum, moments and decay do not move rows that are not selected: only the drawn rows ever change."""
    model, bank, adapter = _dylora(frozen=frozen)
    nudge(bank)
    seen, moved = [], set()
    snapshots = []

    def watch():
        seen.append(adapter.now)
        snapshots.append((adapter.A.detach().clone(), adapter.B.detach().clone()))

    _train(model, bank, 25, optimizer=optimizer, watch=watch, **settings)
    snapshots.append((adapter.A.detach().clone(), adapter.B.detach().clone()))
    for step, b in enumerate(seen):
        free = set(range(b - 1 if frozen else 0, b))
        (a0, b0), (a1, b1) = snapshots[step : step + 2]
        for changed in ((a0 != a1).any(1), (b0 != b1).any(0)):
            assert set(changed.nonzero().flatten().tolist()) == free
            moved |= free
    assert moved == {0, 1, 2, 3}
    assert len(set(seen)) == 4


def test_a_fake_that_masks_gradients_only_is_seen():
    """The test above sees the pitfall: without the rule's last hook, Adam moves rows that were not drawn."""
    model, bank, adapter = _dylora()
    nudge(bank)

    class Fake(RankSampling):
        def after_step(self, run):
            return None

    x, target = torch.randn(16, 6).double(), torch.randn(16, 5).double()
    run = stage(model, 6, torch.optim.AdamW([p for _, p, _ in bank.trainable()], lr=0.05))
    before = adapter.A.detach().clone()
    drawn = set()

    def loss():
        drawn.add(adapter.now - 1)
        return (model(x) - target).square().mean()

    drive(run, [Fake(distribution=(0.5, 0.5, 0.0, 0.0))], loss)
    assert (before != adapter.A).any(1).tolist() == [True] * 4
    assert drawn == {0, 1}


@pytest.mark.parametrize(("scaling", "frozen"), [("alpha/r", True), ("alpha/r", False), ("alpha/b", False)])
def test_loss_falls_with_rank(scaling, frozen):
    """Must hold: after training on a planted rank-4 change of known order, loss(b) never rises with b. With a scale that
    does not shrink the earlier rows, every rank ends at the best that a matrix of that rank can do.
    """
    torch.manual_seed(0)
    model, bank, _ = _dylora(r=5, lora_alpha=5.0, scaling=scaling, frozen=frozen)
    u, v = torch.linalg.qr(torch.randn(5, 4).double())[0], torch.linalg.qr(torch.randn(6, 4).double())[0]
    planted = u @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]).double()) @ v.T
    x = torch.eye(6).double()
    target = model(x).detach() + x @ planted.T
    _train(model, bank, 2500, lr=0.01, x=x, target=target, weight_decay=0.0)
    losses = []
    for b in range(1, 6):
        set_rank(bank, b)
        losses.append((model(x) - target).square().sum().item())
    assert all(later <= earlier + 0.01 for earlier, later in itertools.pairwise(losses))
    assert losses[4] < 0.2 * losses[0]
    if scaling == "alpha/r":
        assert losses == pytest.approx([5.25, 1.25, 0.25, 0, 0], abs=0.02)


def test_one_draw_for_all_sites():
    """Procedure: the rank is drawn once in a step for all sites; sites of a lower rank share the cumulative chance."""
    model = Net(p=nn.Linear(6, 5), q=nn.Linear(6, 5), s=nn.Linear(6, 5))
    bank = rl.attach(model, DyLoRA(r=4), rank_pattern={"s": 2})
    ranks = []

    def watch():
        ranks.append([a.now for _, a in bank.adapters("default")])

    x = torch.randn(8, 6)
    run = stage(model, 40, torch.optim.AdamW([p for _, p, _ in bank.trainable()]))

    def loss():
        watch()
        return model(x).square().mean()

    drive(run, bank.plans["default"].method.rules(), loss)
    assert all(p == q and s == math.ceil(p / 2) for p, q, s in ranks)
    assert {p for p, _, _ in ranks} == {1, 2, 3, 4}


def _drawn(steps, seed=0, **settings):
    model, bank, adapter = _dylora(seed=seed, **settings)
    ranks = []
    _train(model, bank, steps, watch=lambda: ranks.append(adapter.now))
    return ranks


def test_draws_by_seed():
    """Deterministic by its own seed, whatever torch's; another seed draws others; the global stream is not touched."""
    torch.manual_seed(11)
    first = _drawn(30)
    torch.manual_seed(12)
    assert _drawn(30) == first
    assert _drawn(30, seed=1) != first
    rule, model = RankSampling(), _dylora()[0]
    run = stage(model, 5)
    state = torch.get_rng_state()
    rule.start(run)
    rule.before_step(run)
    assert torch.equal(torch.get_rng_state(), state)


def test_distributions():
    """Uniform, geometric and given chances: counted over many draws; a rank without a chance is never drawn."""
    for distribution, chances in (
        ("uniform", [0.25] * 4),
        ("geometric", [w / sum(0.85**i for i in range(4)) for w in (1, 0.85, 0.85**2, 0.85**3)]),
        ((0.0, 1.0, 0.0, 3.0), [0, 0.25, 0, 0.75]),
    ):
        rule, (model, _, adapter) = RankSampling(distribution), _dylora()
        run = stage(model, 1)
        rule.start(run)
        drawn = []
        for _ in range(2000):
            rule.before_step(run)
            drawn.append(adapter.now)
        frequency = [drawn.count(b) / 2000 for b in (1, 2, 3, 4)]
        assert frequency == pytest.approx(chances, abs=0.035)
        assert [f == 0 for f in frequency] == [c == 0 for c in chances]
    assert inverse((0.5, 0.5, 0.0), 0.9999999999999999) == 1
    assert inverse((0.0, 0.5, 0.5), 0.0) == 1
    assert sum(probabilities("geometric", 7)) == pytest.approx(1)


def test_resume():
    """Six steps in one go equal three, a checkpoint of the rule's memory, and three more."""
    straight = _drawn(12)
    model, _, adapter = _dylora()
    run = stage(model, 1)
    rule, drawn = RankSampling(), []
    rule.start(run)
    for step in range(12):
        if step == 5:
            state = copy.deepcopy(rule.state())
            rule = RankSampling()
            rule.start(run)
            rule.restore(state)
        rule.before_step(run)
        drawn.append(adapter.now)
    assert drawn == straight
    assert all(isinstance(v, torch.Tensor) for v in rule.state().values())


def test_evaluation_and_the_end_know_no_draws():
    """Pitfall of a peer: in eval mode, and after the training, the rank is the one that was set, not a drawn one."""
    model, bank, adapter = _dylora(rank_distribution=(1.0, 0.0, 0.0, 0.0))
    nudge(bank)
    x, seen = torch.randn(3, 6).double(), []

    def watch():
        seen.append(adapter.now)
        model.eval()
        seen.append(adapter.now)
        model.train()

    model.train()
    _train(model, bank, 2, watch=watch)
    assert seen == [1, 4, 1, 4]
    assert adapter.now == 4
    set_rank(bank, 2)
    after = model(x)
    bank.merge("default")
    assert torch.allclose(model(x), after, atol=1e-12)


def test_blocks_of_ranks():
    """Interface: unit = 2: ranks 2, 4, 6; frozen, a block of two rows learns; other ranks are refused."""
    model, bank, adapter = _dylora(linear(8, 7), r=6, unit=2)
    nudge(bank)
    adapter.sample(4)
    model(torch.randn(9, 8).double()).square().sum().backward()
    assert adapter.A.grad.any(1).tolist() == [False, False, True, True, False, False]
    with pytest.raises(SettingsError, match="rank=3: a multiple of 2 from 2 to 6"):
        set_rank(bank, 3)
    rule = RankSampling()
    run = stage(model, 1)
    rule.start(run)
    drawn = set()
    for _ in range(40):
        rule.before_step(run)
        drawn.add(adapter.now)
    assert drawn == {2, 4, 6}


LAYERS = {
    "embedding": (lambda: nn.Embedding(11, 5), lambda: torch.randint(11, (3, 4))),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3), lambda: torch.randn(2, 6, 5, 5)),
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 6)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_count_and_merge(kind):
    """Identity at every rank, r(o + i) numbers, merges at the chosen rank."""
    make, batch = LAYERS[kind]
    model, x = Net(layer=make()).eval(), batch()
    before = model(x)
    bank = rl.attach(model, DyLoRA(r=3), target_modules=["layer"])
    (site,) = bank.sites("default")
    assert count(bank) == 3 * (site.in_ + site.out)
    for b in (1, 3):
        set_rank(bank, b)
        assert torch.equal(model(x), before)
    nudge(bank)
    set_rank(bank, 2)
    spoken = model(x)
    bank.merge("default")
    assert torch.allclose(model(x), spoken, atol=1e-5)


def test_copies_keep_the_rank():
    """deepcopy and pickle keep the rank; the methods' settings survive JSON once registered, here by their fields."""
    model, bank, _ = _dylora()
    nudge(bank)
    set_rank(bank, 2)
    x = torch.randn(3, 6).double()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert only(twin.rankloom).rank == 2
        assert torch.equal(twin(x), model(x))


def test_stacked_experts():
    """Bare stacked parameters [E, out, in] are adapted at the rank too, and rows are put back along the right dims."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 5, 6).double())

        def forward(self, x):
            return torch.einsum("eoi,bi->beo", self.w, x)

    model = Experts()
    bank = rl.attach(model, DyLoRA(r=4), target_modules=(), target_parameters=["w"])
    nudge(bank)
    adapter = only(bank)
    before = adapter.A.detach().clone(), adapter.B.detach().clone()
    x = torch.randn(7, 6).double()
    run = stage(model, 4, torch.optim.AdamW([p for _, p, _ in bank.trainable()], weight_decay=0.5))
    drive(run, [RankSampling(distribution=(0.0, 0.0, 1.0, 0.0))], lambda: model(x).square().mean())
    assert (before[0] != adapter.A).any(-1).tolist() == [[False, False, True, False]] * 3
    assert (before[1] != adapter.B).any(-2).tolist() == [[False, False, True, False]] * 3


def test_refuses():
    for settings, message in (
        ({"init_lora_weights": "pissa"}, "not zero at the start"),
        ({"r": 6, "unit": 4}, "unit=4"),
        ({"r": 0}, "r=0"),
        ({"rank_distribution": "zipf"}, "rank_distribution='zipf'"),
    ):
        with pytest.raises(SettingsError, match=message):
            DyLoRA(**settings)
    model, bank, _ = _dylora(rank_distribution=(0.5, 0.5))
    with pytest.raises(SettingsError, match="2 chances, an adapter has 4 ranks"):
        bank.plans["default"].method.rules()[0].start(stage(model))
    lora = linear()
    rl.attach(lora, rl.LoRA(r=2))
    with pytest.raises(SettingsError, match="needs adapters with many ranks"):
        RankSampling().start(stage(lora))
    with pytest.raises(SettingsError, match="'default' is LoRA: only DyLoRA has a rank"):
        set_rank(lora.rankloom, 1)
    with pytest.raises(SettingsError, match="rank=5: a multiple of 1 from 1 to 4"):
        set_rank(bank, 5)
    both = Net(p=nn.Linear(6, 5), s=nn.Linear(6, 5))
    mixed = rl.attach(both, DyLoRA(r=4), rank_pattern={"s": 2})
    with pytest.raises(SettingsError, match="different ranks; use set_rank"):
        truncate(mixed, 2)
