"""The rank-k step as a filter of the spectrum: matrix products alone, no factorization and no basis to keep.

Shape legend: the last two dimensions are a matrix [m, n], leading ones are a batch. Inside, matrices are wide:
S = min(m, n) rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_kit.linalg.polar import polar_express
from lowrank_kit.linalg.topk import peak_scaled

_STEPS = 8
_TRIALS = 20
# The count of directions that pass may miss k by 1 %: the LMO ratio then loses at most as much.
_SLACK = 0.01


def first_threshold(k: int) -> float:
    """Where the search begins: s_k is at most 1 / sqrt(k) of the Frobenius norm."""
    return 0.1 / math.sqrt(k)


def filter_topk_polar(M: Tensor, k: int, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """U_k V_k^T of M, up to a soft edge between s_k and s_{k+1}: a spectral projector times the polar factor.

    With M wide: O = polar(M), H = M O^T = U S U^T, step = 1/2 (I + sign(H - t I)) O, where t lets k directions pass:
    the trace of the projector counts them. t is doubled or halved from the one before until k is between two of them,
    then bisected. Polar factor and sign are eight steps of Polar Express in float32. Where the count ends above k the
    step is scaled down, so that its nuclear norm is within the budget.

    Args:
        M: [..., m, n] float.
        k: 1 <= k <= S.
        threshold: [..., 1, 1] float32, t relative to the Frobenius norm of H, from the step before; None starts anew.

    Returns:
        The step [..., m, n] float32, singular values in [0, 1] with a nuclear norm of at most k, and the threshold for
        the next call. The rank is k but for directions at the edge, which pass in part.

    Source: spectral filters by matrix sign functions as in LITE (arXiv 2602.22681), which takes two polar factors.
    Deviation: the projector is formed on the smaller side, and the threshold found by its trace.
    """
    wide = peak_scaled(M if M.shape[-2] <= M.shape[-1] else M.mT).float()
    polar = polar_express(wide, steps=_STEPS, dtype=torch.float32)
    H = wide @ polar.mT
    H = (H + H.mT) / 2
    H = H / H.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    t = torch.full_like(H[..., :1, :1], first_threshold(k)) if threshold is None else threshold.float()
    low, high = torch.zeros_like(t), torch.full_like(t, torch.inf)
    projector, count = _passing(H, t)
    for _ in range(_TRIALS):
        close = (count - k).abs() <= _SLACK * k
        if close.all():
            break
        low, high = torch.where(count > k, t, low), torch.where(count > k, high, t)
        between = torch.where(high.isinf(), 2 * low, torch.where(low == 0, high / 2, (low * high).sqrt()))
        # Below float32's noise nothing is left to count: the rank is less than k.
        t = torch.where(close, t, between.clamp(min=1e-7))
        projector, count = _passing(H, t)
    # Where k would part equal singular values, all of them pass.
    parted = (count < (1 - _SLACK) * k) & (low > 0)
    if parted.any():
        t = torch.where(parted, low, t)
        projector, count = _passing(H, t)
    step = projector @ polar * (k / count.clamp(min=k))
    return (step if M.shape[-2] <= M.shape[-1] else step.mT), t


def _passing(H: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The projector on the eigenvectors of H with an eigenvalue above t, and how many they are, [..., 1, 1]."""
    eye = torch.eye(H.shape[-1], device=H.device)
    projector = (eye + polar_express(H - t * eye, steps=_STEPS, dtype=torch.float32)) / 2
    return projector, projector.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
