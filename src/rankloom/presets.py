"""Systems that are only a choice of parts. Settings beyond those that a preset names are the method's."""

from __future__ import annotations

import re
from typing import Any, Literal

from rankloom.core.gate import Gate
from rankloom.core.plan import Plan
from rankloom.errors import SettingsError
from rankloom.gates.block import Block
from rankloom.gates.first_pass import FirstPass
from rankloom.gates.linear import Linear
from rankloom.gates.task import Task
from rankloom.gates.topk import TopK
from rankloom.methods.asymmetric import AsymmetricLoRA
from rankloom.methods.blend import Blend
from rankloom.methods.dylora import DyLoRA
from rankloom.methods.lora import LoRA
from rankloom.methods.mixture import Mixture
from rankloom.rules.balance import SequenceBalance, TypeBalance
from rankloom.rules.projection import ProjectedGradient
from rankloom.rules.relora import ReLoRA
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


def llava_mole(
    n: int = 3,
    balance: float = 0.01,
    gate_output: bool = False,
    r: int = 32,
    lora_alpha: float = 64.0,
    lora_dropout: float = 0.05,
    **settings: Any,
) -> Plan:
    """LLaVA-MoLE (arXiv 2401.16160): of `n` LoRA experts each token goes through one, by a router on the input of the
    MLP (the module around a layer). Its weight is 1, and `balance` alone moves the router; `gate_output=True`: its
    weight is its probability. Experts belong on the MLP; a LoRA of another name may adapt attention beside them.
    """
    gate = TopK(1, "kept" if gate_output else "one", Block("parent", bias="inside"))
    return Plan(Mixture(LoRA(r, lora_alpha, lora_dropout, **settings), n, gate), rules=(SequenceBalance(balance),))


def loftq(bits: int = 4, iters: int = 5, quantizer: Literal["nf", "uniform"] = "nf", **settings: Any) -> Plan:
    """LoftQ (arXiv 2310.08659): LoRA whose factors start from what `bits`-bit weights lose, best of `iters` rounds of
    quantisation and SVD; "nf" is NormalFloat in blocks of 64, "uniform" affine in groups of 32.
    """
    store: Store = NormalFloat(bits, double=False) if quantizer == "nf" else Uniform(bits)
    return Plan(LoRA(**{"r": 16, "lora_alpha": 16.0, **settings}), store=store, start=LoftQ(iters))


def lora_fa(**settings: Any) -> Plan:
    """LoRA-FA (arXiv 2308.03303): A frozen at its start, B's gradient projected onto the full gradient step."""
    return Plan(LoRA(**{"frozen": "A", **settings}), rules=(ProjectedGradient(),))


def lora_flow(adapters: tuple[str, ...] = (), start: int | None = -1, temperature: float = 1.0) -> Blend:
    """LoRA-Flow (arXiv 2402.11455): for each token a gate on each block's input weighs adapters of the bank, of any
    ranks, softmax(W x/τ) + b; at first about the adapter number `start` alone. Only W and b train.
    """
    return Blend(adapters, Block(bias="outside", start=start, std=0.02, temperature=temperature))


def loramoe(
    n: int = 6,
    blc_weight: float = 0.1,
    blc_alpha: float = 0.1,
    r: int = 4,
    lora_alpha: float = 32.0,
    lora_dropout: float = 0.05,
    **settings: Any,
) -> Plan:
    """LoRAMoE (arXiv 2312.09979): `n` LoRA experts mixed by a softmax, half of them kept for each type of data.

    The localized balancing constraint (`blc_weight` β, `blc_alpha` δ) reads the column "task_types", 0 or 1 a row.
    """
    method = Mixture(LoRA(r, lora_alpha, lora_dropout, **settings), n)
    return Plan(method, rules=(TypeBalance(blc_weight, blc_alpha),))


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
    """MOELoRA (arXiv 2310.18339): rank `r` in `n` experts of r/n, weighed by the row's task.

    Ids 0 (padding) to `task_num` in the batch's column "task"; `unknown` where there is none. For one task it merges:
    `merge(context={"task": 1})`.
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


def relora(
    every: int = 2000,
    reset: Literal["zero", "random", "magnitude"] = "zero",
    prune: float = 0.999,
    restart_warmup: int = 50,
    min_lr_ratio: float | None = None,
    **settings: Any,
) -> Plan:
    """ReLoRA (arXiv 2307.05695): LoRA that is folded into the base and restarted every `every` steps (`rules.relora`).

    The paper trains embeddings, norms and head whole beside it: attach(…, modules_to_save=[…], bias="all").
    """
    method = LoRA(**{"r": 128, "lora_alpha": 32.0, "lora_dropout": 0.1, **settings})
    return Plan(method, rules=(ReLoRA(every, reset, prune, restart_warmup, min_lr_ratio=min_lr_ratio),))


def rslora(**settings: Any) -> LoRA:
    """rsLoRA (arXiv 2312.03732): LoRA with the scale lora_alpha/√r."""
    return LoRA(**{"scaling": "rslora", **settings})


def xlora(
    adapters: tuple[str, ...] = (),
    xlora_depth: int = 1,
    xlora_size: int = 2048,
    xlora_dropout_p: float = 0.2,
    layerwise_scalings: bool = False,
    softmax_temperature: float = 1.0,
    top_k_lora: int | None = None,
    global_scaling_weight: float = 1.0,
) -> Blend:
    """X-LoRA (arXiv 2402.07148): a classifier of the base's own last hidden states weighs adapters of the bank, token
    by token (`layerwise_scalings`: for each site). Only the classifier trains; PEFT's names and defaults.
    """
    first = FirstPass(xlora_depth, xlora_size, xlora_dropout_p, layerwise_scalings, temperature=softmax_temperature)
    return Blend(adapters, first if top_k_lora is None else TopK(top_k_lora, gate=first), global_scaling_weight)
