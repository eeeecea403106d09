"""An honest leaf method, and deliberate fakes of it: each breaks one promise of the contract.

`FAKES` says which check must catch which fake, and with which words.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.rule import Rule, Run
from rankloom.core.selection import Weight
from rankloom.core.site import Site
from rankloom.core.thin import Thin
from rankloom.errors import NotMergeable, TargetError

FAKES: dict[str, tuple[type[Method], dict[str, str]]] = {}
"""Name → (method, {check that must catch it: words of its message})."""


@dataclass(frozen=True)
class Honest(Method):
    """ΔW = scale·B A: the twin of every fake, which passes the whole contract."""

    r: int = 2
    scale: float = 2.0

    def build(self, site: Site) -> Adapter | None:
        site.needs_matrix("honest")
        return HonestAdapter(site, self)


class HonestAdapter(Adapter):
    roles = {"A": "in", "B": "out"}

    def __init__(self, site: Site, method: Any) -> None:
        super().__init__(site.name)
        self.scale = method.scale
        self.A = site.empty(method.r, site.in_)
        self.B = site.empty(site.out, method.r)

    def reset(self, base: Base) -> None:
        with torch.no_grad():
            self.A.normal_(std=0.3)
            self.B.zero_()

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return base.up(base.down(x, self.A.to(y.dtype)), self.scale * self.B.to(y.dtype))

    def delta(self, base: Base) -> Tensor:
        return self.scale * (self.B @ self.A)


def fake(name: str, **caught_by: str) -> Callable[[type[Adapter]], type[Adapter]]:
    """Make a method `name` that builds the decorated adapter, and list it."""

    def declare(adapter: type[Adapter]) -> type[Adapter]:
        def build(self: Honest, site: Site) -> Adapter:
            return adapter(site, self)

        cls = dataclass(frozen=True)(type(name, (Honest,), {"__module__": __name__, "build": build}))
        globals()[name] = cls
        FAKES[name] = (cls, caught_by)
        return adapter

    return declare


def declare(name: str, **caught_by: str) -> Callable[[type[Method]], type[Method]]:
    """List a whole fake method."""

    def keep(cls: type[Method]) -> type[Method]:
        FAKES[name] = (cls, caught_by)
        return cls

    return keep


# — the start and the base ——————————————————————————————————————————————————————————————————————————————————————————


@fake("StartsNonzero", identity="the model with the fresh adapter is not the base")
class StartsNonzeroAdapter(HonestAdapter):
    def reset(self, base: Base) -> None:
        nn.init.normal_(self.A, std=0.3)
        nn.init.normal_(self.B, std=0.01)


@fake("NeverReached", reached="is not reached", learns="does not depend on any trainable tensor")
class NeverReachedAdapter(HonestAdapter):
    def add(self, out: Tensor, x: Any, y: Tensor, base: Base, weight: Weight) -> Tensor:
        return out


@fake("MissesOneLayer", reached="'layers.1.q_proj' is not reached")
class MissesOneLayerAdapter(HonestAdapter):
    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        change = super().forward(x, y, base)
        return change * 0 if "1" in self.site_name else change


@fake("Noisy", repeats="is dropout on")
class NoisyAdapter(HonestAdapter):
    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return F.dropout(super().forward(x, y, base), 0.5, training=True)


@fake("EditsBaseInReset", base="weight' was changed by attach")
class EditsBaseInResetAdapter(HonestAdapter):
    def reset(self, base: Base) -> None:
        super().reset(base)
        base.kind.tensor(base.layer).data.mul_(1.001)


@fake("EditsBaseInForward", base="changed by a forward and backward pass", frozen="changed by training")
class EditsBaseInForwardAdapter(HonestAdapter):
    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        if self.training:
            base.kind.tensor(base.layer).data.add_(1e-3)
        return super().forward(x, y, base)


@fake("UnfreezesBase", base="still requires a gradient")
class UnfreezesBaseAdapter(HonestAdapter):
    def reset(self, base: Base) -> None:
        super().reset(base)
        base.kind.tensor(base.layer).requires_grad_(True)


@fake("AddsAModule", base="modules came or went", detach="extra is new")
class AddsAModuleAdapter(HonestAdapter):
    def reset(self, base: Base) -> None:
        super().reset(base)
        base.layer.extra = nn.Identity()


@declare("ChangesTheBaseOnly", base_only="inside `with bank.using")
@dataclass(frozen=True)
class ChangesTheBaseOnly(Honest):
    """A hook on the model that changes its output whatever the bank says."""

    def patch(self, model: nn.Module) -> Callable[[], None]:
        return model.register_forward_hook(_louder).remove


def _louder(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * (1 + 1e-6)


@declare("LeavesHook", detach="forward_hooks of the model")
@dataclass(frozen=True)
class LeavesHook(Honest):
    """A patch without an undo."""

    def patch(self, model: nn.Module) -> Callable[[], None]:
        model.register_forward_hook(_observer)
        return super().patch(model)


def _observer(module: nn.Module, args: Any, output: Tensor) -> None:
    return None


@declare("LeavesClassPatched", detach="Linear.extra_repr")
@dataclass(frozen=True)
class LeavesClassPatched(Honest):
    """Patches the class of every linear layer of the process."""

    def patch(self, model: nn.Module) -> Callable[[], None]:
        original = nn.Linear.extra_repr
        nn.Linear.extra_repr = lambda self: original(self)  # type: ignore[method-assign]
        return super().patch(model)


# — the matrix ——————————————————————————————————————————————————————————————————————————————————————————————————————


@fake(
    "MergesWithoutScale",
    merge="merged against unmerged",
    delta="`forward` against `delta`",
    fold="the base after the fold",
)
class MergesWithoutScaleAdapter(HonestAdapter):
    def delta(self, base: Base) -> Tensor:
        return self.B @ self.A


@fake("ForwardTransposed", merge="merged against unmerged", delta="`forward` against `delta`")
class ForwardTransposedAdapter(HonestAdapter):
    """Square layers hide it: ΔWᵀ instead of ΔW in `delta`."""

    def delta(self, base: Base) -> Tensor:
        change = super().delta(base)
        return change.mT.contiguous() if change.shape[-1] == change.shape[-2] else change


@fake("ForgetsBias", merge="the bias", delta="`forward` against `delta`")
class ForgetsBiasAdapter(HonestAdapter):
    """A trained bias that no `delta_bias` tells of."""

    def __init__(self, site: Site, method: Any) -> None:
        super().__init__(site, method)
        self.bias = nn.Parameter(torch.zeros(site.out, dtype=site.dtype, device=site.device))

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return super().forward(x, y, base) + base.shift(y, self.bias.to(y.dtype))


@fake("RefusesTooLate", merge="raised NotMergeable, and yet: value of layers.0.q_proj.weight")
class RefusesTooLateAdapter(HonestAdapter):
    def delta(self, base: Base) -> Tensor:
        base.kind.tensor(base.layer).data.add_(0.1)
        raise NotMergeable(f"too late at {self.site_name!r}")


@fake("RefusesWithoutName", merge="must name the site")
class RefusesWithoutNameAdapter(HonestAdapter):
    def delta(self, base: Base) -> Tensor:
        raise NotMergeable("no")


@fake("UnmergesRoughly", unmerge="changed by merge and unmerge")
class UnmergesRoughlyAdapter(HonestAdapter):
    """`delta` writes the change into the base tensor and takes it out again: almost what it was."""

    def delta(self, base: Base) -> Tensor:
        change = super().delta(base)
        tensor = base.kind.tensor(base.layer)
        tensor.data.add_(base.kind.to_weight(base.layer, change).to(tensor.dtype) * 1e3)
        tensor.data.sub_(base.kind.to_weight(base.layer, change).to(tensor.dtype) * 1e3)
        return change


@fake("ResetsOnce", fold="the change must be zero again")
class ResetsOnceAdapter(HonestAdapter):
    """The start is made once; a second reset leaves what was learnt."""

    def __init__(self, site: Site, method: Any) -> None:
        super().__init__(site, method)
        self.started = False

    def reset(self, base: Base) -> None:
        if not self.started:
            super().reset(base)
        self.started = True


@fake("ThinIsAnother", thin="the change of the thin form, against `forward`")
class ThinIsAnotherAdapter(HonestAdapter):
    """A thin form of twice the change, where nothing else reads it: in evaluation, of an input."""

    def thin(self, base: Base, x: Any) -> Thin:
        twice = x is not None and not self.training
        return Thin(self.A, self.B, self.scale * (2 if twice else 1))


@fake("TrainsAnother", thin="has a gradient on one path of the fused and the plain")
class TrainsAnotherAdapter(HonestAdapter):
    """A thin form without the gradient of A, which the fused path takes."""

    def thin(self, base: Base, x: Any) -> Thin:
        return Thin(self.A.detach(), self.B, self.scale)


@fake("MixesTheStack", stacked="`delta` of matrix 0 of the stack", inside_mixture="against their sum")
class MixesTheStackAdapter(HonestAdapter):
    """Every matrix of a stack gets the mean change."""

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return base.apply(x, self.delta(base).to(y.dtype)) if y.ndim == 3 and x is None else super().forward(x, y, base)

    def delta(self, base: Base) -> Tensor:
        change = super().delta(base)
        return change if change.ndim == 2 else change.mean(0).expand_as(change)


@fake("NormsOfTheBase", inside_dora="‖W + ΔW‖ by rows")
class NormsOfTheBaseAdapter(HonestAdapter):
    """Row norms that forget the change: DoRA's rows get other lengths than its magnitude."""

    def row_norms(self, base: Base) -> Tensor:
        return torch.linalg.vector_norm(base.matrix(), dim=-1)


# — training ————————————————————————————————————————————————————————————————————————————————————————————————————————


@fake("DeadParameter", gradients="q_proj:unused' (3,) (role none) requires a gradient and never got one")
class DeadParameterAdapter(HonestAdapter):
    def __init__(self, site: Site, method: Any) -> None:
        super().__init__(site, method)
        self.unused = site.empty(3)

    def reset(self, base: Base) -> None:
        super().reset(base)
        nn.init.zeros_(self.unused)


@fake("ZeroGradient", gradients="q_proj:gate' (1,) (role none) was zero")
class ZeroGradientAdapter(HonestAdapter):
    """A gate that is multiplied away: a gradient that is there, and zero for ever."""

    def __init__(self, site: Site, method: Any) -> None:
        super().__init__(site, method)
        self.gate = site.empty(1)

    def reset(self, base: Base) -> None:
        super().reset(base)
        nn.init.ones_(self.gate)

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return super().forward(x, y, base) * (1 + 0 * self.gate)


@fake("CopiesShared", gradients="shared:gain' (2,) (role scale) requires a gradient and never got one")
class CopiesSharedAdapter(HonestAdapter):
    """Clones the shared tensor instead of borrowing it: what is trained is not what acts."""

    def __init__(self, site: Site, method: Any) -> None:
        super().__init__(site, method)
        site.shared.provide(
            "gain", lambda: torch.ones(method.r, dtype=site.dtype, device=site.device), role="scale", trainable=True
        )
        self.register_buffer("gain", site.shared.tensor("gain").detach().clone())

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return base.up(base.down(x, self._a(y)), self.scale * self.B.to(y.dtype))

    def _a(self, y: Tensor) -> Tensor:
        return (self.gain[:, None] * self.A).to(y.dtype)

    def delta(self, base: Base) -> Tensor:
        return self.scale * (self.B @ (self.gain[:, None] * self.A))


class _Uphill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return -grads[0]


@fake("LearnsUphill", learns="after 40 steps")
class LearnsUphillAdapter(HonestAdapter):
    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return _Uphill.apply(super().forward(x, y, base))


@fake("CountsItsCalls", checkpointing="is a state kept in forward")
class CountsItsCallsAdapter(HonestAdapter):
    """What it gives in training depends on how often it was called; recomputed activations differ."""

    def __init__(self, site: Site, method: Any) -> None:
        super().__init__(site, method)
        self.calls = 0

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        self.calls += self.training
        return super().forward(x, y, base) * (1 + 0.1 * self.calls)


@dataclass
class Drift(Rule):
    """Pushes the adapter by a memory that it does not save."""

    pushes: int = field(default=0, init=False)

    def start(self, run: Run) -> None:
        self.pushes = 0

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        self.pushes += 1
        for _, parameter, _ in run.bank.trainable():
            parameter.add_(1e-3 * self.pushes)


@declare("ForgetsRuleMemory", resume="the losses of steps 4 to 6")
@dataclass(frozen=True)
class ForgetsRuleMemory(Honest):
    def rules(self) -> list[Rule]:
        return [Drift()]


@fake("SkipsItsHooks", penalty="a hook on an adapter never fired", context="the adapter was never called")
class SkipsItsHooksAdapter(HonestAdapter):
    """Calls past `__call__`, so nobody can watch it."""

    def add(self, out: Tensor, x: Any, y: Tensor, base: Base, weight: Weight) -> Tensor:
        change = self.forward(x, y, base)
        scale = weight.to(y.dtype) if isinstance(weight, Tensor) else weight
        while isinstance(scale, Tensor) and 0 < scale.ndim < change.ndim:
            scale = scale[..., None]
        return out + scale * change


@fake("IgnoresPenalties", penalty="does not reach the adapter")
class IgnoresPenaltiesAdapter(HonestAdapter):
    """Whoever listens sees a change without a gradient."""

    def __call__(self, x: Any, y: Tensor, base: Base) -> Tensor:
        with torch.no_grad():
            super().__call__(x, y, base)
        return self.forward(x, y, base)


@fake("DropsContext", context="the batch's context does not reach")
class DropsContextAdapter(HonestAdapter):
    """A combinator that makes a base of its own."""

    def __init__(self, site: Site, method: Any) -> None:
        super().__init__(site, method)
        self.inner = HonestAdapter(site, method)

    def reset(self, base: Base) -> None:
        super().reset(base)
        self.inner.reset(base)

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return super().forward(x, y, base) + self.inner(x, y, Base(base.kind, base.layer))

    def delta(self, base: Base) -> Tensor:
        return super().delta(base) + self.inner.delta(base)


@fake("RemembersItsFirstBase", fold_resume="the losses of steps 4 to 6")
class RemembersItsFirstBaseAdapter(HonestAdapter):
    """Scales by the norm that the base had when it was last reset, and keeps that where no checkpoint sees it."""

    def reset(self, base: Base) -> None:
        super().reset(base)
        self.size = float(base.matrix().norm())

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return super().forward(x, y, base) * self.size

    def delta(self, base: Base) -> Tensor:
        return super().delta(base) * self.size


@fake("HidesFromState", state="another model after load_state")
class HidesFromStateAdapter(HonestAdapter):
    """A random scale that no tensor holds."""

    def reset(self, base: Base) -> None:
        super().reset(base)
        self.secret = 1 + float(torch.rand(()))

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return super().forward(x, y, base) * self.secret

    def delta(self, base: Base) -> Tensor:
        return super().delta(base) * self.secret


# — several adapters ————————————————————————————————————————————————————————————————————————————————————————————————


@fake(
    "LeaksBetweenRows",
    independence="row 0 alone and within the whole batch, in evaluation",
    rows="against use('a')",
    rows_tensor="against use('b')",
)
class LeaksBetweenRowsAdapter(HonestAdapter):
    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        change = super().forward(x, y, base)
        return change - 0.1 * change.mean(0, keepdim=True)


@fake("LeaksInTraining", independence="in training mode")
class LeaksInTrainingAdapter(HonestAdapter):
    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        change = super().forward(x, y, base)
        return change - change.mean(0, keepdim=True) if self.training else change


@fake("IgnoresWeight", weights="at weight 0.0")
class IgnoresWeightAdapter(HonestAdapter):
    def add(self, out: Tensor, x: Any, y: Tensor, base: Base, weight: Weight) -> Tensor:
        return out + self.forward(x, y, base)


@fake("RoundsTensorWeight", weights="a weight of its own for each row")
class RoundsTensorWeightAdapter(HonestAdapter):
    """Takes one number out of a tensor of weights by row."""

    def add(self, out: Tensor, x: Any, y: Tensor, base: Base, weight: Weight) -> Tensor:
        number = weight.flatten()[0] if isinstance(weight, Tensor) else weight
        return (
            out + number.to(y.dtype) * self.forward(x, y, base)
            if isinstance(number, Tensor)
            else (out + number * self.forward(x, y, base))
        )


@fake("SeesOthers", adds="against the base and the two changes")
class SeesOthersAdapter(HonestAdapter):
    """Reacts to what others have changed already, not to the base alone."""

    def add(self, out: Tensor, x: Any, y: Tensor, base: Base, weight: Weight) -> Tensor:
        gain = 1 + (out - y).tanh()
        return super().add(out, x, y, base, weight) * 1 + (gain - 1) * self.forward(x, y, base)


@fake("WritesOnSwitch", switching="must not write into the model: attribute", detach="last_active is new")
class WritesOnSwitchAdapter(HonestAdapter):
    """Writes into the layer who was active last."""

    def add(self, out: Tensor, x: Any, y: Tensor, base: Base, weight: Weight) -> Tensor:
        base.layer.last_active = id(self)
        return super().add(out, x, y, base, weight)


_buffer: dict[str, Tensor] = {}


@fake("SharesABuffer", threads="beside another one")
class SharesABufferAdapter(HonestAdapter):
    """Puts its change into a buffer that all threads use."""

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        _buffer[self.site_name] = super().forward(x, y, base)
        time.sleep(0.002)
        return _buffer[self.site_name]


# — portability ———————————————————————————————————————————————————————————————————————————————————————————————————


@declare("ForgetsASetting", settings="against the original")
@dataclass(frozen=True)
class ForgetsASetting(Method):
    """`scale` is kept beside the fields, where no JSON sees it."""

    r: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _scale[0])

    def build(self, site: Site) -> Adapter:
        site.needs_matrix("forgets")
        return HonestAdapter(site, self)


_scale = [3.0]


def forgetful() -> ForgetsASetting:
    """One that was made with another scale than a fresh one gets."""
    _scale[0] = 3.0
    made = ForgetsASetting()
    _scale[0] = 1.0
    return made


@declare("HasADeadSetting", settings_matter="setting momentum=0.5: 0.25 or 1.0 instead changes neither")
@dataclass(frozen=True)
class HasADeadSetting(Honest):
    """A setting that nothing reads."""

    momentum: float = 0.5


@declare("CallsALivingSettingInert", settings_matter="setting 'scale' is declared inert, and 1.0 changes the output")
@dataclass(frozen=True)
class CallsALivingSettingInert(Honest):
    """A setting that is declared to do nothing, and does."""

    inert = {"scale": "wrong"}  # noqa: RUF012


@fake("HidesATensor", moves="not on the expected device", bf16="same dtype")
class HidesATensorAdapter(HonestAdapter):
    """A tensor that is no parameter and no buffer: `.to()` does not find it."""

    def __init__(self, site: Site, method: Any) -> None:
        super().__init__(site, method)
        self.hidden = [torch.ones(method.r, dtype=site.dtype, device=site.device)]

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return base.up(base.down(x, self.A), self.scale * (self.B * self.hidden[0]))


@fake("KeepsALambda", pickles="lambda")
class KeepsALambdaAdapter(HonestAdapter):
    def __init__(self, site: Site, method: Any) -> None:
        super().__init__(site, method)
        self.squash = lambda change: change


@fake("SharesWithItsCopy", copies="shares the tensor")
class SharesWithItsCopyAdapter(HonestAdapter):
    """A copy that holds the very tables of the original."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__ = dict(self.__dict__)
        return twin


@fake("UpcastsInHalf", bf16="same dtype")
class UpcastsInHalfAdapter(HonestAdapter):
    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return super().forward(x, y, base).float() if y.dtype == torch.bfloat16 else super().forward(x, y, base)


@fake("BlowsUpInHalf", bf16="at its start the adapter changes")
class BlowsUpInHalfAdapter(HonestAdapter):
    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return super().forward(x, y, base) + (1e38 if y.dtype == torch.bfloat16 else 0) * 10 * y.square()


@fake("IgnoresAutocast", autocast="with the adapter: cast factors")
class IgnoresAutocastAdapter(HonestAdapter):
    """A product that autocast does not reach raises the outputs to float32."""

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return base.up(base.down(x.to(self.A.dtype), self.A), self.scale * self.B)
        return super().forward(x, y, base)


@fake("ForgetsToSave", save_load="is a tensor not saved")
class ForgetsToSaveAdapter(HonestAdapter):
    """A random projection that is neither saved nor made again from a seed."""

    def __init__(self, site: Site, method: Any) -> None:
        super().__init__(site, method)
        self.register_buffer("secret", torch.randn(method.r, dtype=site.dtype), persistent=False)

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return base.up(base.down(x, (self.secret[:, None] * self.A).to(y.dtype)), self.scale * self.B.to(y.dtype))

    def delta(self, base: Base) -> Tensor:
        return self.scale * (self.B @ (self.secret[:, None] * self.A))


# — the compiler ————————————————————————————————————————————————————————————————————————————————————————————————————


@fake("BranchesOnValues", compile="data-dependent")
class BranchesOnValuesAdapter(HonestAdapter):
    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        change = super().forward(x, y, base)
        return change if float(change.detach().abs().max()) < 1e9 else change * 0


@fake("OtherWhenCompiled", compile="compiled against uncompiled")
class OtherWhenCompiledAdapter(HonestAdapter):
    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        change = super().forward(x, y, base)
        return change * 1.5 if torch.compiler.is_compiling() else change


@fake("RecompilesForever", recompiles="compiled again")
class RecompilesForeverAdapter(HonestAdapter):
    """A python counter that the compiled code is specialised to."""

    def __init__(self, site: Site, method: Any) -> None:
        super().__init__(site, method)
        self.seen: list[float] = []

    def add(self, out: Tensor, x: Any, y: Tensor, base: Base, weight: Weight) -> Tensor:
        self.seen.append(0.0)
        return super().add(out, x, y, base, weight)


# — the kinds of layers —————————————————————————————————————————————————————————————————————————————————————————————


@declare("RefusesNamelessly", kind_conv2d="must name the site")
@dataclass(frozen=True)
class RefusesNamelessly(Honest):
    def build(self, site: Site) -> Adapter | None:
        if site.kind.name == "conv2d":
            raise TargetError("this layer is not supported")
        return super().build(site)


@declare("LinearOnly", kind_conv2d="shapes cannot", kind_embedding="shapes cannot", kind_parameter="NoneType")
@dataclass(frozen=True)
class LinearOnly(Honest):
    """Takes every kind and treats it as a linear layer."""

    def build(self, site: Site) -> Adapter | None:
        return LinearOnlyAdapter(site, self)


class LinearOnlyAdapter(HonestAdapter):
    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return F.linear(F.linear(x, self.A), self.scale * self.B)


@declare("ReadsLayout", kind_conv1d_transposed="must match")
@dataclass(frozen=True)
class ReadsLayout(Honest):
    """Forgets that GPT-2's layers keep their weight transposed."""

    def build(self, site: Site) -> Adapter | None:
        return ReadsLayoutAdapter(site, self)


class ReadsLayoutAdapter(HonestAdapter):
    def reset(self, base: Base) -> None:
        super().reset(base)
        base.kind.tensor(base.layer)[: self.B.shape[0], : self.A.shape[1]] + self.B @ self.A
