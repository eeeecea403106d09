"""What a rule may see and do in `fit`: the batch, its output, notes, other forwards, the rate, tensors of new shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from noting import Balance, Noting
from torch import nn
from train_world import llama, mlp, points, tensors_of, texts

import rankloom as rl
from rankloom import registry
from rankloom.core.rule import Rule
from rankloom.errors import SettingsError, StateError
from rankloom.rules.orthogonal import Orthogonal
from rankloom.train.fit import fit
from rankloom.train.settings import TrainSettings


def noting(make: Any = mlp, targets: Any = ("0", "2"), **settings: Any) -> nn.Module:
    model = make()
    torch.manual_seed(1)
    rl.attach(model, Noting(r=2, **settings), target_modules=list(targets))
    return model


def by_hand(model: nn.Module, batches: list[Any], weight: float) -> None:
    """One SGD-free reference: gradients of mean loss + balance, written down without rules."""
    for x, y in batches:
        seen = []
        hooks = [
            site.layer.register_forward_pre_hook(
                lambda m, args, a=site.adapter, seen=seen: seen.append((args[0] @ a.A.mT).softmax(-1))
            )
            for site in model.rankloom.sites("default")
        ]
        loss = nn.functional.mse_loss(model(x), y)
        for hook in hooks:
            hook.remove()
        penalty = sum(p.shape[-1] * p.flatten(0, -2).mean(0).square().sum() for p in seen)
        ((loss + weight * penalty) / len(batches)).backward()


def lora() -> nn.Module:
    model = mlp()
    torch.manual_seed(1)
    rl.attach(model, rl.LoRA(r=2), target_modules=["0", "2"])
    return model


class Gradients(Rule):
    """Keeps the gradients of each step."""

    def __init__(self) -> None:
        self.each: list[list[torch.Tensor]] = []

    def after_backward(self, run):
        self.each.append([p.grad.clone() for p in run.parameters.values()])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_penalty_on_activations_has_its_gradient(accumulate):
    """Notes are alive in `loss`: gradients are those of loss + penalty, averaged over accumulated batches."""
    model, other, rule = noting(), noting(), Gradients()
    settings = TrainSettings(steps=1, accumulate=accumulate, clip=None)
    fit(model, points(3), rules=[Balance(0.7), rule], settings=settings)
    by_hand(other, points(3)[:accumulate], 0.7)
    for got, (_, want, _) in zip(rule.each[0], other.rankloom.trainable()):
        assert torch.allclose(got, want.grad, atol=1e-6)
    plain = Gradients()
    fit(noting(), points(3), rules=[plain], settings=settings)
    assert not all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.each[0], rule.each[0]))


def test_checkpointing_keeps_the_penalty():
    """Recomputed layers note again and count once: the same gradients with gradient checkpointing."""
    each = []
    for on in (False, True):
        rule = Gradients()
        model = noting(llama, ["q_proj", "up_proj"])
        settings = TrainSettings(steps=2, gradient_checkpointing=on, clip=None, lr=1e-2)
        fit(model, texts(2), rules=[Balance(), rule], settings=settings)
        each.append(rule.each)
        assert model.rankloom.selector.notes is None
    for a, b in zip(each[0], each[1]):
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a, b))


def test_reentrant_checkpointing_is_refused():
    """Not silent: the reentrant kind would lose the penalty's gradient; the remedy is named. Without readers it runs."""
    model = noting(llama, ["q_proj"])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    fit(model, texts(1), steps=1)
    with pytest.raises(StateError, match=r"'router'.*use_reentrant=False"):
        fit(model, texts(1), steps=1, rules=[Balance()])


class Looks(Rule):
    """Compares what it sees in `loss` with what it computes itself."""

    reads = ("router",)

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def before_step(self, run):
        assert run.batch is None
        assert run.output is None

    def loss(self, run, loss):
        noted = {site: t.clone() for site, t in run.notes["router"].items()}
        state = torch.get_rng_state()
        with torch.no_grad():
            base = run.forward(run.batch)
            own = run.forward(run.batch, *run.bank.active)
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(noted[site], t) for site, t in run.notes["router"].items())
        assert torch.allclose(own, run.output)
        assert own.shape == run.output.shape
        assert run.device == torch.device("cpu")
        self.seen.append((run.batch, run.output.detach(), base))
        return loss

    def after_step(self, run):
        assert run.batch is None
        assert not run.notes["router"]


def test_a_rule_sees_batch_output_and_the_bases_own_answer():
    """`run.forward` without names is the base alone; it disturbs neither notes nor output nor the random state."""
    model, rule, batches = noting(lora_dropout=0.0), Looks(), points(3)
    base = mlp()
    fit(model, batches, steps=3, lr=0.05, rules=[rule])
    for (batch, _, alone), given in zip(rule.seen, batches):
        assert torch.equal(batch[0], given[0])
        assert torch.equal(alone, base(given[0]))
    assert not torch.allclose(rule.seen[2][1], rule.seen[2][2])


def test_output_of_a_loss_of_ones_own():
    """With loss=…, the output is what the model returned last with gradients, whatever the loss makes of it."""
    seen = []

    class Out(Rule):
        def loss(self, run, loss):
            seen.append(run.output)
            return loss

    def own(model, batch):
        out = model(batch[0])
        with torch.no_grad():
            model(batch[0] * 0)
        return (out - batch[1]).abs().mean() + 3

    model = noting()
    want = model(points(1)[0][0]).detach()
    fit(model, points(1), steps=1, rules=[Out()], loss=own)
    assert torch.equal(seen[0], want)


def test_nothing_is_kept_where_nobody_reads():
    """No rule reads the kind: nothing is kept; a rule on the loss alone sees empty notes."""
    seen = []

    class Idle(Rule):
        def loss(self, run, loss):
            seen.append(dict(run.notes["router"]))
            return loss

    fit(noting(), points(1), steps=1, rules=[Idle()])
    assert seen == [{}]


@dataclass
class Jagged(Rule):
    """Half the rate in every second step."""

    def rate(self, run):
        return 0.5 if run.step % 2 else 1.0


def test_rate_multiplies_every_group_and_is_logged(tmp_path):
    """lr = peak · schedule · rate in every group, in the log too; a run resumed in the middle ends bit for bit alike."""
    rows: list[Any] = []
    lora_plus = rl.LoRAPlus(ratio=4.0)
    settings = TrainSettings(steps=6, lr=0.1, schedule="linear", log_every=1, save_every=3)
    peaks = []

    class Peaks(Rule):
        def after_backward(self, run):
            peaks.append(sorted(g["lr"] for g in run.optimizer.param_groups))

    model = lora()
    fit(
        model,
        points(6),
        rules=[lora_plus, Jagged(), Peaks()],
        settings=settings,
        report=rows.append,
        out=tmp_path / "a",
    )
    want = [0.1 * (1 - i / 6) * (0.5 if i % 2 else 1) for i in range(6)]
    assert [r["lr"] for r in rows if r["event"] == "train"] == pytest.approx(want)
    assert [p[-1] / p[0] for p in peaks] == pytest.approx([4.0] * 6)
    again = lora()
    with pytest.raises(RuntimeError, match="stop"):
        fit(again, points(6), rules=[lora_plus, Jagged(), Peaks()], settings=settings, out=tmp_path / "b",
            report=lambda row: stop(row, 3))  # fmt: skip
    again = lora()
    fit(again, points(6), rules=[lora_plus, Jagged(), Peaks()], settings=settings, out=tmp_path / "b", resume=True)
    a, b = tensors_of(model), tensors_of(again)
    assert all(torch.equal(a[k], b[k]) for k in a)


def stop(row: Any, step: int) -> None:
    if row["event"] == "save" and row["step"] == step:
        raise RuntimeError("stop")


def test_a_rate_that_is_no_number_is_refused():
    """Not silent: a negative or infinite rate names its rule."""

    class Odd(Rule):
        def rate(self, run):
            return -1.0

    with pytest.raises(SettingsError, match=r"Odd\.rate"):
        fit(noting(), points(1), steps=1, rules=[Odd()])


def test_rules_of_what_does_not_train_rest():
    """An active adapter that is frozen, or that `bank.train` leaves out, keeps its rules at rest and stays as it is."""
    for freeze in (True, False):
        model = mlp()
        rl.attach(model, rl.AdaLoRA(init_r=2, target_r=1), "old", target_modules=["0"])
        rl.attach(model, rl.LoRA(r=2), "new", target_modules=["0", "2"])
        if freeze:
            for _, p, _ in model.rankloom.tensors("old"):
                p.requires_grad_(False)
        else:
            model.rankloom.train("new")
        model.rankloom.use("old", "new")
        before = {k: p.detach().clone() for k, p, _ in model.rankloom.tensors("old")}
        found = fit(model, points(2), steps=3)
        assert found.losses[-1] < found.losses[0] * 2
        assert all(torch.equal(before[k], p) for k, p, _ in model.rankloom.tensors("old"))


def test_named_but_not_active_is_refused():
    """Not silent: `bank.train` names an adapter that is not active."""
    model = mlp()
    rl.attach(model, rl.LoRA(r=2), "a", target_modules=["0"])
    rl.attach(model, rl.LoRA(r=2), "b", target_modules=["0"])
    model.rankloom.use("a")
    model.rankloom.train("b")
    with pytest.raises(SettingsError, match=r"bank\.train"):
        fit(model, points(1), steps=1)


class Late(Rule):
    """Gives the optimizer a tensor of its own in step 2."""

    def __init__(self) -> None:
        self.own = nn.Parameter(torch.ones(3))
        self.rates: list[float] = []

    def loss(self, run, loss):
        return loss + self.own.square().sum()

    def before_step(self, run):
        if run.step == 2:
            run.optimizer.add_param_group({"params": [self.own], "lr": 0.1})

    def after_backward(self, run):
        self.rates.append(run.optimizer.param_groups[-1]["lr"])


def test_a_rule_may_add_parameters(tmp_path):
    """A group that joins in mid-run follows the schedule from its own peak, is clipped, checked and saved."""
    rule = Late()
    model = lora()
    fit(model, points(2), rules=[rule], settings=TrainSettings(steps=4, lr=0.01, schedule="linear"), out=tmp_path)
    assert rule.rates == pytest.approx([0.01, 0.0075, 0.05, 0.025])
    assert float(rule.own.detach().max()) < 1


@dataclass
class Shrinks(Rule):
    """After step 4 every pair keeps its first half of ranks."""

    keep_memory: bool = True

    def after_step(self, run):
        if run.step + 1 != 4:
            return
        for _, adapter in run.bank.adapters("default"):
            for name, dim in adapter.rank_dims().items():
                old = adapter.get_parameter(name)
                keep = torch.arange(old.shape[dim] // 2)
                kept = (dim, keep) if self.keep_memory else None
                new = run.replace(old, old.detach().index_select(dim, keep), kept)
                assert adapter.get_parameter(name) is new
                assert new is run.parameters[next(k for k, p in run.parameters.items() if p is new)]
                memory = run.optimizer.state.get(new)
                assert (memory["exp_avg"].shape == new.shape) if self.keep_memory else memory is None
                assert old not in run.optimizer.state


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw"])
def test_a_run_that_shrinks_its_ranks_resumes_bit_for_bit(tmp_path, keep, optimizer):
    """Ranks halve in step 4; broken off after step 5, resumed on a fresh model of the plan's ranks: the same bits."""
    settings = TrainSettings(steps=8, lr=0.05, save_every=5, schedule="linear", optimizer=optimizer)

    def model():
        made = mlp()
        torch.manual_seed(1)
        rl.attach(made, rl.LoRA(r=4), target_modules=["0", "2"])
        return made

    straight, broken, again = model(), model(), model()
    rules = [Shrinks(keep), rl.LoRAPlus(ratio=2.0)]
    fit(straight, points(3), rules=rules, settings=settings, out=tmp_path / "a")
    with pytest.raises(RuntimeError, match="stop"):
        fit(broken, points(3), rules=rules, settings=settings, out=tmp_path / "b", report=lambda row: stop(row, 5))
    fit(again, points(3), rules=rules, settings=settings, out=tmp_path / "b", resume=True)
    a, b = tensors_of(straight), tensors_of(again)
    assert a["default/0:A"].shape == (2, 6)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    fresh = mlp()
    rl.load(fresh, tmp_path / "b" / "checkpoints" / "step-00000008")
    x = points(1)[0][0]
    assert torch.equal(fresh(x), again(x))


def test_the_step_after_a_replacement_is_that_of_the_smaller_model():
    """With the optimizer's memory kept, the halves that stay go on as they would have: Adam is element by element."""

    class Frozen(Rule):
        """The other half, left in but made to say nothing: gradients and values zero."""

        def after_step(self, run):
            if run.step + 1 >= 4:
                for _, adapter in run.bank.adapters("default"):
                    adapter.A.data[2:] = 0
                    adapter.B.data[:, 2:] = 0

    made = []
    for rule in (Shrinks(), Frozen()):
        model = mlp()
        torch.manual_seed(1)
        rl.attach(model, rl.LoRA(r=4), target_modules=["0", "2"])
        fit(model, points(3), rules=[rule], settings=TrainSettings(steps=6, lr=0.05, clip=None))
        made.append([(a.A[:2].detach(), a.B[:, :2].detach()) for _, a in model.rankloom.adapters()])
    for (a, b), (c, d) in zip(*made):
        assert torch.allclose(a, c, atol=1e-6)
        assert torch.allclose(b, d, atol=1e-6)


def test_end_with_best_takes_its_ranks_back(tmp_path):
    """The best checkpoint may be of a step before the ranks fell: the model ends with that one's ranks."""
    model = mlp()
    rl.attach(model, rl.LoRA(r=4), target_modules=["0"])
    worse = iter(range(100))
    settings = TrainSettings(steps=6, eval_every=2, end_with="best")
    found = fit(model, points(2), rules=[Shrinks()], evaluate=lambda m: float(next(worse)), settings=settings,
                out=tmp_path)  # fmt: skip
    assert found.best.step == 2
    assert next(a for _, a in model.rankloom.adapters()).A.shape == (4, 6)


def test_replacing_what_is_nowhere_is_refused():
    """Not silent: a tensor that was replaced before."""

    class Odd(Rule):
        def after_step(self, run):
            run.replace(nn.Parameter(torch.ones(2)), torch.ones(1))

    with pytest.raises(StateError, match="in no module"):
        fit(noting(), points(1), steps=1, rules=[Odd()])


@dataclass(frozen=True)
class Plain(rl.AdaLoRA):
    def rules(self):
        return [Orthogonal(0.1)]


def test_adalora_compacts_in_mid_run(tmp_path, monkeypatch):
    """Triplets that the budget has let go are taken out for real, and the run goes on and resumes exactly."""
    from rankloom.methods.adalora import AdaLoRAAdapter, compact

    monkeypatch.setitem(registry._METHODS, "plain_triplets", f"{Plain.__module__}:Plain")

    @dataclass
    class Compacts(Rule):
        def after_step(self, run):
            if run.step + 1 == 3:
                for _, adapter in run.bank.adapters(of=AdaLoRAAdapter):
                    with torch.no_grad():
                        adapter.E[1] = 0
                    assert compact(adapter, run) == 2

    def model():
        made = mlp()
        torch.manual_seed(1)
        rl.attach(made, Plain(init_r=3, target_r=2), target_modules=["0", "2"])
        return made

    settings = TrainSettings(steps=6, lr=0.05, save_every=4)
    straight, broken, again = model(), model(), model()
    fit(straight, points(3), rules=[Compacts()], settings=settings, out=tmp_path / "a")
    with pytest.raises(RuntimeError, match="stop"):
        fit(broken, points(3), rules=[Compacts()], settings=settings, out=tmp_path / "b",
            report=lambda row: stop(row, 4))  # fmt: skip
    fit(again, points(3), rules=[Compacts()], settings=settings, out=tmp_path / "b", resume=True)
    a, b = tensors_of(straight), tensors_of(again)
    assert a["default/0:E"].shape == (2, 1)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_adapters_by_row_note_too():
    """Rows of a batch with adapters of their own: nobody is stacked past a rule that reads."""
    seen = []

    class Keeps(Rule):
        reads = ("router",)

        def loss(self, run, loss):
            seen.append({site: t.shape for site, t in run.notes["router"].items()})
            return loss

    model = noting()
    model.rankloom.use(rows=["default", None] * 4)
    fit(model, points(1), steps=1, rules=[Keeps()])
    assert seen == [{"0": (4, 2), "2": (4, 2)}]
