"""The rank-k step: the polar factor of the top-k part of a matrix.

Shape legend: the last two dimensions are a matrix [m, n], leading ones are a batch; S = min(m, n).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Ranks are rounded to a multiple where the error of that is small: half a multiple is at most 1/32 of such a side.
_LEAST_SIDE_IN_MULTIPLES = 16


def rank_of_fraction(fraction: float, shape: tuple[int, int] | torch.Size, *, multiple: int = 1) -> int:
    """k = ceil(fraction * min(m, n)), at least 1; to the nearest multiple where the matrix is wide enough.

    Args:
        fraction: rank fraction, 0 < fraction <= 1.
        shape: (m, n); leading batch dimensions are ignored.
        multiple: k is rounded to a multiple of it, at least one, when min(m, n) is 16 of them or more. Shapes then
            change in steps as a schedule goes on, and suit the tiles of an accelerator.

    Source: NuMuon (arXiv 2603.03597), rank schedule. Deviation: the multiple.
    """
    side = min(shape[-2], shape[-1])
    # Rounded first, so that 0.07 * 100 = 7.000000000000001 gives 7.
    k = min(side, max(1, math.ceil(round(fraction * side, 9))))
    if fraction == 1 or side < _LEAST_SIDE_IN_MULTIPLES * multiple:
        return k
    return min(side, max(1, (k + multiple // 2) // multiple) * multiple)


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
        [..., m, n] float32 or better, singular values 0 or 1.

    Source: NuMuon (arXiv 2603.03597): the linear minimization over {|D|_2 <= 1, |D|_* <= k} is attained at
    U_k V_k^T; no rescaling by sqrt(k).
    """
    side = min(M.shape[-2:])
    if not 1 <= k <= side:
        raise ValueError(f"k must be between 1 and min(m, n) = {side}, got {k}")
    # MPS has no float64.
    dtype = torch.float32 if M.device.type == "mps" else torch.float64
    wide = peak_scaled((M if M.shape[-2] <= M.shape[-1] else M.mT).to(dtype))
    energies, U = torch.linalg.eigh(wide @ wide.mT)
    s_k = energies[..., -k:].clamp(min=0).sqrt()
    U_k = U[..., -k:]
    threshold = torch.finfo(torch.float32).eps * max(M.shape[-2:]) * s_k[..., -1:]
    inverse = torch.where(s_k > threshold, 1 / s_k, torch.zeros_like(s_k))
    out = ((U_k * inverse[..., None, :]) @ (U_k.mT @ wide)).to(torch.promote_types(M.dtype, torch.float32))
    return out if M.shape[-2] <= M.shape[-1] else out.mT


def lmo_ratio(M: Tensor, step: Tensor, k: int) -> float:
    """<M, step> / sum of the k largest singular values of M: 1 for the exact step, the largest a feasible one reaches.

    Args:
        M: [m, n] float, not zero.
        step: [m, n], singular values at most 1, nuclear norm at most k.
        k: 1 <= k <= S.

    Returns:
        The ratio, in float64; 1 for the zero matrix.
    """
    if M.device.type == "mps":  # which has no float64
        M, step = M.cpu(), step.cpu()
    best = torch.linalg.svdvals(M.double())[:k].sum()
    return 1.0 if best == 0 else ((M.double() * step.double()).sum() / best).item()


def peak_scaled(M: Tensor) -> Tensor:
    """M over its largest entry, matrix by matrix: squares of tiny and of huge entries leave the range of their dtype.

    Args:
        M: [..., m, n] float; zero stays zero.

    Returns:
        Like M, in float32 or better: a quotient rounded to bfloat16 would be another matrix.
    """
    M = M.to(torch.promote_types(M.dtype, torch.float32))
    return M / M.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(M.dtype).tiny)
