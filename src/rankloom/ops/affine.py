"""Affine integer grids: Ŵ = scale·(q − zero), q in 0 … 2**bits − 1, and how to round to them.

Round to nearest, or GPTQ: column after column, the error of each is made good in those that are not rounded yet
(Frantar et al., ICLR 2023, arXiv 2210.17323, algorithm 1; columns in their own order).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankloom.errors import SettingsError

BLOCK = 128
"""Columns after which the rest of the matrix is brought up to date."""


def affine_grid(weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and floating zero point (…) of the grid between the extremes of `weights` (…, n)."""
    low, high = weights.amin(-1), weights.amax(-1)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    return scale, -low / scale


def affine_codes(weights: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes nearest to `weights` (…, n), in the dtype of the weights."""
    return (weights / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)


@dataclass(frozen=True)
class Rounded:
    """codes (out, in), scale and zero (out, groups) of a matrix."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def gptq(weight: Tensor, hessian: Tensor, bits: int, group: int, damp: float = 0.01) -> Rounded:
    """Round `weight` (out, in) for the least ‖(W − Ŵ)X‖, where `hessian` (in, in) is proportional to X Xᵀ.

    `group` columns share a grid, laid when its first column is reached; `damp`: what is added to the diagonal, as a
    part of its mean. A column that no input reaches is rounded to nearest. Computed in float32 at least. Raises
    `SettingsError` for a Hessian of another size, or one that is not positive definite.
    """
    columns = weight.shape[-1]
    if columns % group or hessian.shape != (columns, columns):
        raise SettingsError(
            f"a weight with {columns} columns, groups of {group} and a Hessian of {tuple(hessian.shape)} do not fit"
        )
    rest = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    feed = _feedback(hessian.to(rest.dtype), damp)
    grids: list[tuple[Tensor, Tensor]] = []
    codes = torch.empty_like(rest)
    step = max(group, BLOCK // group * group)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        errors = torch.empty_like(rest[:, start:stop])
        for j in range(start, stop):
            if j % group == 0:
                grids.append(affine_grid(rest[:, j : j + group], bits))
            scale, zero = grids[-1]
            codes[:, j] = affine_codes(rest[:, j, None], scale, zero, bits)[:, 0]
            error = (rest[:, j] - scale * (codes[:, j] - zero)) / feed[j, j]
            rest[:, j + 1 : stop].addr_(error, feed[j, j + 1 : stop], alpha=-1)
            errors[:, j - start] = error
        rest[:, stop:].addmm_(errors, feed[start:stop, stop:], alpha=-1)
    scales, zeros = (torch.stack(each, -1) for each in zip(*grids))
    return Rounded(codes, scales, zeros)


def _feedback(hessian: Tensor, damp: float) -> Tensor:
    """U, upper triangular, with Uᵀ U the inverse of the damped Hessian."""
    diagonal = hessian.diagonal()
    added = damp * diagonal.mean() + (diagonal == 0).to(hessian)
    try:
        factor = torch.linalg.cholesky(hessian + torch.diag(added))
        feed: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    except RuntimeError as error:
        raise SettingsError(
            f"damp={damp}: the Hessian is not positive definite ({error}); give more damping, or more calibration data"
        ) from error
    return feed
