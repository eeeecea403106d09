"""GPTQ as a start: affine codes chosen for what the layers get to see; the adapters stay as their method starts them.

Frantar et al., ICLR 2023, arXiv 2210.17323. What QA-LoRA's paper quantises its base with (arXiv 2309.14717).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rankloom.core.start import Calibration, Evidence, Start, Started
from rankloom.core.view import BankView
from rankloom.errors import SettingsError
from rankloom.settings import Positive
from rankloom.store.base import Packed, Store, dense
from rankloom.store.calibrate import hessians
from rankloom.store.gptq import DAMP, pack_gptq
from rankloom.store.model import frozen, keep_with
from rankloom.store.uniform import Uniform


@dataclass(frozen=True)
class GPTQ(Start):
    """`damp`: of the Hessian's mean diagonal, added to it. Every layer is rounded for what it sees in the dense model;
    the store is `uniform`.
    """

    damp: Positive = DAMP

    @property
    def calibrated(self) -> bool:
        return True

    def gather(self, model: nn.Module, layers: Mapping[str, nn.Module], batches: Calibration) -> Evidence:
        """Σ x xᵀ of every kept layer's input."""
        return Evidence(hessians=hessians(layers, batches, lambda batch: model(**batch)))

    def check(self, bank: BankView, name: str) -> int:
        if not isinstance(bank.plans[name].store, Uniform):
            raise SettingsError(
                f"start=gptq rounds affine codes, and the store is {bank.plans[name].store}: use uniform"
            )
        return 0

    @torch.no_grad()
    def apply(self, bank: BankView, name: str, stores: Mapping[str, Store], evidence: Evidence) -> dict[str, Started]:
        found = {}
        for layer, store in stores.items():
            assert isinstance(store, Uniform)
            weight = dense(frozen(bank.model, f"{layer}.weight"))
            seen = evidence.hessians[layer]
            made = pack_gptq(weight, store, seen, self.damp)
            errors = (_error(weight - store.round_trip(weight), seen), _error(weight - dense(made), seen))
            keep_with(bank.model, {f"{layer}.weight": partial(_already, made)})
            found[layer] = Started(errors, 1)
        return found


def _already(made: Packed, _: Tensor) -> Packed:
    return made


def _error(lost: Tensor, hessian: Tensor) -> float:
    """‖lost·X‖ of the inputs X behind Σ x xᵀ."""
    lost = lost.to(hessian)
    return float(((lost @ hessian) * lost).sum().clamp_min(0).sqrt())
