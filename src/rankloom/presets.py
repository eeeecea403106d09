"""Systems that are only a choice of parts. Settings beyond those that a preset names are the method's."""

from __future__ import annotations

import re
from typing import Any, Literal

from rankloom.core.gate import Gate
from rankloom.core.plan import Plan
from rankloom.errors import SettingsError
from rankloom.gates.linear import Linear
from rankloom.gates.task import Task
from rankloom.gates.topk import TopK
from rankloom.methods.asymmetric import AsymmetricLoRA
from rankloom.methods.dylora import DyLoRA
from rankloom.methods.lora import LoRA
from rankloom.methods.mixture import Mixture
from rankloom.rules.projection import ProjectedGradient
from rankloom.starts.split import LQ, LQER, LoftQ
from rankloom.store.base import Store
from rankloom.store.blockfloat import BlockFloat
from rankloom.store.mixed import MixedBits
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform

_FACTOR_CODES = {"V": "svd", "V_last": "svd_last", "U": "svd", "U_last": "svd_last"}


def asymmetric_lora(code: str = "A_rand_hB_zero", **settings: Any) -> AsymmetricLoRA:
    """Asymmetric LoRA by the authors' code: `h` (hat) before a trained factor, and each factor's start.

    Starts: rand, he, zero, and V, V_last (of A) or U, U_last (of B) for singular vectors of W. The default is the
    published setting: A orthonormal and kept, B trained from zero. Raises `SettingsError` for any other code.
    """
    found = re.fullmatch(r"(h?)A_(rand|he|zero|V|V_last)_(h?)B_(rand|he|zero|U|U_last)", code)
    if found is None:
        raise SettingsError(f"asymmetric_lora: {code!r} is no code such as 'A_rand_hB_zero' or 'hA_zero_B_U'")
    hat_a, start_a, hat_b, start_b = found.groups()
    starts: dict[str, Any] = {
        "init_A": _FACTOR_CODES.get(start_a, start_a),
        "init_B": _FACTOR_CODES.get(start_b, start_b),
    }
    return AsymmetricLoRA(**{**starts, "update_A": bool(hat_a), "update_B": bool(hat_b), **settings})


def hydralora(
    n_b: int = 4, infer: Literal["soft", "top1"] = "soft", r: int = 4, lora_alpha: float = 32.0, **settings: Any
) -> Mixture:
    """HydraLoRA (arXiv 2404.19245): one A, `n_b` heads B, and a router that mixes them token by token; in evaluation
    `infer="top1"` takes the strongest head alone. `n_b` from data: `rankloom.ops.cluster.count_clusters(x)` on
    embeddings x (n, d) of the training texts.
    """
    return Mixture(LoRA(r, lora_alpha, **settings), n_b, Linear(infer=infer), share=("A",))


def loftq(bits: int = 4, iters: int = 5, quantizer: Literal["nf", "uniform"] = "nf", **settings: Any) -> Plan:
    """LoftQ (arXiv 2310.08659): LoRA whose factors start from what `bits`-bit weights lose, best of `iters` rounds of
    quantisation and SVD; "nf" is NormalFloat in blocks of 64, "uniform" affine in groups of 32.
    """
    store: Store = NormalFloat(bits, double=False) if quantizer == "nf" else Uniform(bits)
    return Plan(LoRA(**{"r": 16, "lora_alpha": 16.0, **settings}), store=store, start=LoftQ(iters))


def lora_fa(**settings: Any) -> Plan:
    """LoRA-FA (arXiv 2308.03303): A frozen at its start, B's gradient projected onto the full gradient step."""
    return Plan(LoRA(**{"frozen": "A", **settings}), rules=(ProjectedGradient(),))


def lq_lora(
    bits: float = 3.0, fisher: bool = False, solver: Literal["lagrange", "milp"] = "lagrange", **settings: Any
) -> Plan:
    """LQ-LoRA (arXiv 2311.12023): each weight a low-rank part and a quantised rest, SVD first; widths chosen for each
    matrix within `bits` a weight on average; `fisher`: both weighted by Fisher information, from calibration data.
    """
    method = LoRA(**{"r": 64, "lora_alpha": 16.0, **settings})
    return Plan(method, store=MixedBits(bits, solver=solver), start=LQ(fisher))


def lqer(bits: int = 4, activations: bool = False, **settings: Any) -> Plan:
    """LQER (arXiv 2402.02446), and L²QER with `activations` from calibration data: weights in `bits`-bit block floats,
    the error's low-rank part in 8-bit factors. Nothing need be trained.
    """
    start = LQER(activations, factors=BlockFloat(8))
    return Plan(LoRA(**{"r": 32, "lora_alpha": 32.0, **settings}), store=BlockFloat(bits), start=start)


def moelora_task(
    task_num: int = 2,
    n: int = 8,
    r: int = 16,
    task_embedding_dim: int = 64,
    share_gate: bool = False,
    unknown: int | None = None,
    **settings: Any,
) -> Mixture:
    """MOELoRA (arXiv 2310.18339): rank `r` in `n` experts of r/n, weighed by the row's task: ids 0 (padding) to `task_num`
    in the batch's column "task", `unknown` where there is none. For one task it merges: `merge(context={"task": 1})`.
    """
    if r % n:
        raise SettingsError(f"moelora_task: r={r} is the rank of all experts together, so n={n} must divide it")
    lora = {"lora_alpha": 32.0, "init_lora_weights": "gaussian", **settings}
    lora["lora_alpha"] /= n
    return Mixture(LoRA(r // n, **lora), n, Task(task_num + 1, task_embedding_dim, share=share_gate, unknown=unknown))


def molora(
    n: int | tuple[int, ...] = 10, r: int = 4, lora_alpha: float = 16.0, top_k: int | None = None, **settings: Any
) -> Mixture:
    """MoLoRA (arXiv 2309.05444): `n` LoRA experts mixed by a softmax of the layer's input; `top_k`: only the largest
    weights act, as they are.
    """
    gate: Gate = Linear(std=0.02) if top_k is None else TopK(top_k, "kept", Linear(std=0.02))
    return Mixture(LoRA(r, lora_alpha, **settings), n, gate)


def qdylora(bits: int = 4, **settings: Any) -> Plan:
    """QDyLoRA (arXiv 2402.10462): DyLoRA, every rank up to r, on a NormalFloat base with double quantisation."""
    return Plan(DyLoRA(**{"r": 64, "lora_alpha": 16.0, "frozen": False, **settings}), store=NormalFloat(bits))


def qlora(bits: int = 4, double_quant: bool = True, **settings: Any) -> Plan:
    """QLoRA (arXiv 2305.14314): LoRA on a base in `bits`-bit NormalFloat, blocks of 64, scales in 8 bits
    (`double_quant`). Its paged optimizer is a setting of the training: `train.optimizer=paged_adamw`.
    """
    return Plan(LoRA(**{"r": 64, "lora_alpha": 16.0, **settings}), store=NormalFloat(bits, double=double_quant))


def rslora(**settings: Any) -> LoRA:
    """rsLoRA (arXiv 2312.03732): LoRA with the scale lora_alpha/√r."""
    return LoRA(**{"scaling": "rslora", **settings})
