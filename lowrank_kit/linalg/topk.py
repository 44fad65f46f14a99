"""The rank-k step: the polar factor of the top-k part of a matrix.

Shape legend: the last two dimensions are a matrix [m, n], leading ones are a batch; S = min(m, n).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rank_of_fraction(fraction: float, shape: tuple[int, int] | torch.Size) -> int:
    """k = ceil(fraction * min(m, n)), at least 1.

    Args:
        fraction: rank fraction, 0 < fraction <= 1.
        shape: (m, n); leading batch dimensions are ignored.

    Source: NuMuon (arXiv 2603.03597), rank schedule.
    """
    side = min(shape[-2], shape[-1])
    # Rounded first, so that 0.07 * 100 = 7.000000000000001 gives 7.
    return min(side, max(1, math.ceil(round(fraction * side, 9))))


def topk_polar(M: Tensor, k: int) -> Tensor:
    """U_k V_k^T of M = U S V^T: the exact step of NuMuon, by the eigenvectors of the small-side Gram.

    With M wide, M M^T = U S^2 U^T and O = U_k S_k^{-1} U_k^T M. The Gram is formed and decomposed in float64: squaring
    costs half its digits, so the noise floor is 1e-8 of the largest singular value s_1. Directions below
    eps * max(m, n) * s_1 (as numpy.linalg.matrix_rank; eps of float32 for every dtype: for bfloat16 its own would
    drop every direction at max(m, n) = 128) carry no signal and get no step: the result has rank
    min(k, numerical rank).

    Args:
        M: [..., m, n] float.
        k: number of singular directions, 1 <= k <= S.

    Returns:
        [..., m, n] float32, singular values 0 or 1.

    Source: NuMuon (arXiv 2603.03597): the linear minimization over {|D|_2 <= 1, |D|_* <= k} is attained at
    U_k V_k^T; no rescaling by sqrt(k).
    """
    side = min(M.shape[-2:])
    if not 1 <= k <= side:
        raise ValueError(f"k must be between 1 and min(m, n) = {side}, got {k}")
    # MPS has no float64.
    dtype = torch.float32 if M.device.type == "mps" else torch.float64
    wide = (M if M.shape[-2] <= M.shape[-1] else M.mT).to(dtype)
    # The largest entry first: squares of what float64 can hold leave its range.
    wide = wide / wide.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    energies, U = torch.linalg.eigh(wide @ wide.mT)
    s_k = energies[..., -k:].clamp(min=0).sqrt()
    U_k = U[..., -k:]
    threshold = torch.finfo(torch.float32).eps * max(M.shape[-2:]) * s_k[..., -1:]
    inverse = torch.where(s_k > threshold, 1 / s_k, torch.zeros_like(s_k))
    out = ((U_k * inverse[..., None, :]) @ (U_k.mT @ wide)).float()
    return out if M.shape[-2] <= M.shape[-1] else out.mT
