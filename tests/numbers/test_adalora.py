"""AdaLoRA (arXiv 2303.10512): SVD form, importance, and a rank budget that moves between layers."""

from __future__ import annotations

import pytest
import torch
from number_tools import Net, Stage, count, drive, hand_over, linear, nudge, only, pair, stage
from torch import Tensor, nn

import peft
import rankloom as rl
from rankloom.errors import SettingsError
from rankloom.methods.adalora import AdaLoRA, AdaLoRAAdapter, compact
from rankloom.rules.budget import Budget, budget_at, triplets
from rankloom.rules.orthogonal import Orthogonal


def _net(sites: int = 2, in_: int = 6, out: int = 5) -> Net:
    return Net(**{f"l{i}": nn.Linear(in_, out, bias=False).double() for i in range(sites)})


def _ranks(bank) -> list[int]:
    """Living triplets of each site."""
    return [int((a.E != 0).sum()) for _, a in bank.adapters(of=AdaLoRAAdapter)]


def test_identity_first_gradient_count():
    """Must hold: identity at init; at init only E has a non-zero gradient; r0(o+i+1) numbers; A, B ~ N(0, 0.02²)."""
    model, x = linear(), torch.randn(4, 6).double()
    before = model(x)
    bank = rl.attach(model, AdaLoRA(init_r=4, target_r=2))
    adapter = only(bank)
    assert torch.equal(model(x), before)
    assert count(bank) == 4 * (5 + 6 + 1)
    model(x).square().sum().backward()
    assert adapter.E.grad.abs().min() > 0
    assert not adapter.A.grad.any()
    assert not adapter.B.grad.any()
    wide = only(rl.attach(linear(300, 200), AdaLoRA(init_r=8, target_r=4)))
    assert wide.A.std().item() == pytest.approx(0.02, rel=0.1)
    assert wide.B.std().item() == pytest.approx(0.02, rel=0.1)


def test_equation_by_hand():
    """Mechanism: ΔW = alpha/(r0 + 1e-5) B diag(E) A; alpha ≤ 0 means r0."""
    for alpha, scale in ((6.0, 6 / 2.00001), (0.0, 2 / 2.00001)):
        model = linear(2, 2, bias=False)
        adapter = only(rl.attach(model, AdaLoRA(init_r=2, target_r=1, lora_alpha=alpha)))
        with torch.no_grad():
            model.fc.weight.zero_()
            adapter.A.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
            adapter.E.copy_(torch.tensor([[3.0], [-1.0]]))
            adapter.B.copy_(torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
        want = scale * torch.tensor([[3.0, 5.0], [6.0, 12.0]]).double()
        assert torch.allclose(model(torch.eye(2).double()).T, want, atol=1e-12)
        assert torch.allclose(adapter.delta(None), want, atol=1e-12)


def test_budget_numbers():
    """Must hold: r0 = 12, target 8, 12 sites, t_init 100, t_final 300, T 1000: 144, 144, 143, 123, 102, 96, 96."""
    times = (0, 100, 101, 200, 400, 550, 699)
    found = [budget_at(t, 144, 96, 100, 300, 1000) for t in times]
    assert found == [144, 144, 143, 123, 102, 96, 96]
    assert budget_at(701, 144, 96, 100, 300, 1000) == 96


def test_importance_by_hand():
    """Procedure: Ī = β1 Ī + (1−β1)|p g|, Ū = β2 Ū + (1−β2)|I − Ī|; a triplet scores E's own Ī·Ū plus the means over A and B."""
    model = linear(2, 2, bias=False)
    bank = rl.attach(model, AdaLoRA(init_r=1, target_r=1))
    adapter, run = only(bank), stage(model, 10)
    rule = Budget(1, beta1=0.5, beta2=0.75)
    rule.start(run)
    with torch.no_grad():
        adapter.E.fill_(2.0)
        adapter.A.copy_(torch.tensor([[1.0, 3.0]]))
        adapter.B.copy_(torch.tensor([[1.0], [5.0]]))
    adapter.E.grad = torch.full_like(adapter.E, -4.0)  # I = 8
    adapter.A.grad = torch.tensor([[2.0, 0.0]]).double()  # I = 2, 0
    adapter.B.grad = torch.tensor([[0.0], [2.0]]).double()  # I = 0, 10
    rule.after_backward(run)
    # first step: Ī = I/2, Ū = |I − I/2|/4 = I/8, so s = I²/16: E 4, A (0.25, 0), B (0, 6.25)
    (owner, triplet), *_ = triplets(run)
    assert rule.score(owner, triplet).tolist() == [pytest.approx(4 + 0.125 + 3.125)]
    adapter.E.grad = torch.zeros_like(adapter.E)
    rule.after_backward(run)
    # second step of E: Ī = 2, Ū = 0.75·1 + 0.25·|0 − 2| = 1.25
    a_bar, a_dev = 0.5 * 1 + 0.5 * 2, 0.75 * 0.25 + 0.25 * abs(2 - 1.5)
    b_bar, b_dev = 0.5 * 5 + 0.5 * 10, 0.75 * 1.25 + 0.25 * abs(10 - 7.5)
    assert rule.score(owner, triplet).item() == pytest.approx(2 * 1.25 + a_bar * a_dev / 2 + b_bar * b_dev / 2)


def _random_gradients(run: Stage, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, p, _ in run.bank.trainable():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize(("deltaT", "tfinal"), [(1, 0), (7, 0), (7, 5), (10, 4)])
def test_final_number_of_triplets(deltaT, tfinal):
    """Must hold: after the final mask exactly b_T triplets live, at every step to the end, wherever deltaT falls."""
    model = _net(3)
    bank = rl.attach(model, AdaLoRA(init_r=5, target_r=2))
    nudge(bank)
    run = stage(model, 40)
    rule = Budget(2, tinit=3, tfinal=tfinal, deltaT=deltaT)
    rule.start(run)
    masked = []
    for step in range(40):
        run.step = step
        _random_gradients(run, step)
        rule.after_backward(run)
        for _, a in bank.adapters():
            a.E.data.add_(0.01)
        rule.after_step(run)
        living = sum(_ranks(bank))
        t = step + 1
        if t <= 3 or (t < 40 - tfinal and t % deltaT):
            assert living == 15, t
        else:
            assert living == budget_at(t, 15, 6, 3, tfinal, 40), t
            masked.append(t)
    assert sum(_ranks(bank)) == 6
    assert len(masked) >= tfinal + 1


def test_masked_triplets_may_return_until_the_final_phase():
    """Procedure: a masked E still learns and may return; in the final phase the mask does not move any more."""
    model = _net(1)
    bank = rl.attach(model, AdaLoRA(init_r=2, target_r=1))
    adapter, run = only(bank), stage(model, 10)
    rule = Budget(1, tfinal=4, beta1=0.0, beta2=0.0)

    def step(t: int, loud: int) -> list[bool]:
        run.step = t - 1
        _random_gradients(run, t)
        with torch.no_grad():
            adapter.E.fill_(1.0)
        for _, p, role in bank.trainable():
            axis = {"singular": 0, "in": 0, "out": 1}[role]
            p.grad.select(axis, 1 - loud).mul_(1e-3)
        rule._spread = {k: torch.ones_like(v) for k, v in rule._spread.items()}
        rule.after_backward(run)
        rule._spread = {k: torch.ones_like(v) for k, v in rule._spread.items()}
        rule.after_step(run)
        return (adapter.E != 0).flatten().tolist()

    rule.start(run)
    assert step(5, loud=0) == [True, False]
    assert step(6, loud=1) == [False, True]
    assert step(7, loud=0) == [False, True]
    assert step(10, loud=0) == [False, True]


def test_the_final_mask_is_not_chosen_again():
    """Procedure: in the final phase the last mask holds, however large a masked triplet has become since."""
    model = _net(1)
    bank = rl.attach(model, AdaLoRA(init_r=2, target_r=1))
    adapter, run = only(bank), stage(model, 6)
    rule = Budget(1, tfinal=2, metric="mag")
    rule.start(run)
    with torch.no_grad():
        adapter.E.copy_(torch.tensor([[3.0], [1.0]]))
    for step in (3, 4, 5):
        run.step = step
        rule.after_backward(run)
        rule.after_step(run)
        assert (adapter.E != 0).flatten().tolist() == [True, False]
        with torch.no_grad():
            adapter.E[1] = 50.0


def test_ties_keep_exactly_the_budget():
    """Pitfall: equal scores prune no more than asked, and a full budget prunes nothing."""
    model = _net(2)
    bank = rl.attach(model, AdaLoRA(init_r=4, target_r=3))
    nudge(bank)
    run = stage(model, 1)
    rule = Budget(3)
    rule.start(run)
    for _, p, _ in bank.trainable():
        p.grad = torch.zeros_like(p)
    rule.after_backward(run)
    for budget in (8, 5, 0):
        masks = rule.choose(triplets(run), budget)
        assert sum(int(m.sum()) for m in masks.values()) == budget
    rule.after_step(run)
    assert sum(_ranks(bank)) == 6


def _train(model: Net, target: Tensor, x: Tensor, rules, steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.Adam([p for _, p, _ in model.rankloom.trainable()], lr=lr)
    return drive(stage(model, steps, optimizer), rules, lambda: (model(x) - target).square().sum(1).mean())


def test_planted_ranks_move():
    """Must hold: one layer needs rank 6 and the other 0: the budget of 3 each ends as 6 and 0, and fits the target."""
    torch.manual_seed(1)
    model = _net(2, in_=8, out=8)
    method = AdaLoRA(init_r=6, target_r=3, lora_alpha=6, tinit=20, tfinal=80, deltaT=5, orth_reg_weight=0.1)
    u, v = (torch.linalg.qr(torch.randn(8, 6).double())[0] for _ in range(2))
    x = torch.randn(64, 8).double()
    target = model(x).detach()
    target[:, :8] += x @ (2 * u @ v.T).T
    bank = rl.attach(model, method)
    losses = _train(model, target, x, method.rules(), 300, 0.05)
    assert _ranks(bank) == [6, 0]
    assert losses[-1] < 0.02 * losses[0]


def test_metrics_differ():
    """Must hold: "mag" keeps the large element, "ipt" the one that the loss feels."""
    kept = {}
    for metric in ("ipt", "mag"):
        model = _net(1)
        bank = rl.attach(model, AdaLoRA(init_r=2, target_r=1, metric=metric))
        adapter, run = only(bank), stage(model, 1)
        (rule, _) = AdaLoRA(init_r=2, target_r=1, metric=metric).rules()
        rule.start(run)
        with torch.no_grad():
            for p in adapter.parameters():
                p.fill_(1.0)
            adapter.E.copy_(torch.tensor([[5.0], [0.1]]))
        for _, p, role in bank.trainable():
            p.grad = torch.ones_like(p)
            p.grad.select({"singular": 0, "in": 0, "out": 1}[role], 0).zero_()
        rule.after_backward(run)
        rule.after_step(run)
        kept[metric] = (adapter.E != 0).flatten().tolist()
    assert kept == {"mag": [True, False], "ipt": [False, True]}
    with pytest.raises(SettingsError, match="metric"):
        AdaLoRA(metric="size")


def test_penalty_by_hand():
    """Procedure: γ · mean over all A and B of ‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F."""
    model = linear(2, 3)
    adapter = only(rl.attach(model, AdaLoRA(init_r=2, target_r=1)))
    with torch.no_grad():
        adapter.A.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))  # A Aᵀ − I = diag(3, 0)
        adapter.B.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))  # Bᵀ B − I = diag(0, −1)
    loss = Orthogonal(0.5).loss(stage(model), torch.tensor(10.0).double())
    assert loss.item() == pytest.approx(10 + 0.5 * (3 + 1) / 2)


def test_peft_logits_and_penalty():
    """Oracle: equal logits, and equal orthogonality penalty."""
    base, x = linear(dtype=torch.float32).eval(), torch.randn(4, 6)
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=3, target_modules=["fc"], total_step=100)
    model, wrapped = pair(base, AdaLoRA(init_r=4, target_r=2, lora_alpha=3), config)
    nudge(model.rankloom)
    hand_over(model.rankloom, wrapped)
    assert torch.allclose(model(x), wrapped(x), atol=1e-5)
    grams = [
        p @ p.T if "lora_A" in n else p.T @ p for n, p in wrapped.named_parameters() if "lora_A" in n or "lora_B" in n
    ]
    want = 0.5 * torch.stack([(g - torch.eye(4)).norm() for g in grams]).mean()
    assert Orthogonal(0.5).loss(stage(model), torch.zeros(())).item() == pytest.approx(want.item(), rel=1e-5)


def test_peft_allocates_the_same():
    """Oracle: fed with the same weights and gradients, PEFT's allocator masks the same triplets at every step but the last
    allocation, for which it leaves out the gradient of that very step."""
    base = _net(3)
    total, settings = 30, {"init_r": 4, "target_r": 2, "tinit": 4, "tfinal": 6, "deltaT": 3}
    config = peft.AdaLoraConfig(target_modules=["l0", "l1", "l2"], total_step=total, **settings)
    model, wrapped = pair(base, AdaLoRA(**settings), config)
    run = stage(model, total)
    rule, _ = AdaLoRA(**settings).rules()
    rule.start(run)
    adapters = dict(model.rankloom.adapters("default", of=AdaLoRAAdapter))
    layers = {name: getattr(wrapped.base_model.model, name) for name in adapters}
    masked = 0
    for t in range(1, total + 1):
        run.step = t - 1
        generator = torch.Generator().manual_seed(t)
        for name, adapter in adapters.items():
            for own, theirs in (("A", "lora_A"), ("B", "lora_B"), ("E", "lora_E")):
                p, q = getattr(adapter, own), getattr(layers[name], theirs)["default"]
                value = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                gradient = torch.randn(p.shape, generator=generator, dtype=p.dtype)
                with torch.no_grad():
                    p.copy_(value)
                    q.copy_(value)
                p.grad, q.grad = gradient.clone(), gradient.to(q.dtype)
        rule.after_backward(run)
        rule.after_step(run)
        wrapped.base_model.update_and_allocate(t)
        for name, adapter in adapters.items():
            theirs = layers[name].lora_E["default"] != 0
            if t < 24:
                assert torch.equal(adapter.E != 0, theirs), (t, name)
            masked += int((~theirs).sum())
    assert masked > 20
    assert (
        sum(_ranks(model.rankloom)) == sum(int((layer.lora_E["default"] != 0).sum()) for layer in layers.values()) == 6
    )


def test_memory_survives_a_checkpoint():
    """State: importances, deviations and masks taken back give the same masks as an uninterrupted run."""
    masks = []
    for cut in (None, 6):
        model = _net(2)
        bank = rl.attach(model, AdaLoRA(init_r=4, target_r=2))
        run, rule = stage(model, 14), Budget(2, tfinal=3, deltaT=2)
        rule.start(run)
        for step in range(14):
            run.step = step
            if step == cut:
                state = rule.state()
                rule = Budget(2, tfinal=3, deltaT=2)
                rule.start(run)
                rule.restore(state)
            with torch.no_grad():
                for i, (_, p, _) in enumerate(bank.trainable()):
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(p))
            _random_gradients(run, step)
            rule.after_backward(run)
            rule.after_step(run)
        masks.append([(a.E != 0).flatten().tolist() for _, a in bank.adapters()])
    assert masks[0] == masks[1]


def test_compact():
    """Pitfall: compact drops zero triplets for real, keeps the change and its scale, and keeps one triplet of none."""
    model, x = _net(2), torch.randn(4, 6).double()
    bank = rl.attach(model, AdaLoRA(init_r=5, target_r=2))
    nudge(bank)
    first, second = (a for _, a in bank.adapters())
    with torch.no_grad():
        first.E[[1, 3]] = 0
        second.E.zero_()
    before, scale = model(x), first.scaling
    assert [compact(first), compact(second)] == [3, 1]
    assert first.A.shape == (3, 6)
    assert first.B.shape == (5, 3)
    assert first.E.shape == (3, 1)
    assert first.scaling == scale
    assert torch.allclose(model(x), before, atol=1e-14)
    bank.merge("default")
    assert torch.allclose(model(x), before, atol=1e-12)


def test_stacked_experts_share_the_budget():
    """Stacked experts [n, out, in] count as n matrices: target_r of each on average, and cannot be compacted together."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 5, 6).double())

        def forward(self, x):
            return torch.einsum("eoi,bi->beo", self.weight, x)

    model = Experts()
    method = AdaLoRA(init_r=4, target_r=2)
    bank = rl.attach(model, method, target_modules=[], target_parameters=["weight"])
    nudge(bank)
    run = stage(model, 1)
    drive(run, method.rules(), lambda: model(torch.randn(4, 6).double()).square().mean())
    assert only(bank).E.shape == (3, 4, 1)
    assert int((only(bank).E != 0).sum()) == 6
    with pytest.raises(SettingsError, match="experts"):
        compact(only(bank))


def test_impossible_schedules():
    """Refused by name: phases longer than the run, no interval, a budget above the start."""
    model = _net(1)
    rl.attach(model, AdaLoRA(init_r=2, target_r=1))
    with pytest.raises(SettingsError, match="tinit=5"):
        Budget(1, tinit=5, tfinal=5).start(stage(model, 10))
    for settings in ({"deltaT": 0}, {"beta1": 1.0}, {"target_r": 13}, {"init_r": 0}):
        with pytest.raises(SettingsError):
            AdaLoRA(**settings)
