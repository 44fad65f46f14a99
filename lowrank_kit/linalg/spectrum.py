"""What a spectrum says about a matrix: energy, stable rank, effective rank.

Shape legend: O out, I in, S = min(O, I).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def singular_values(W_OI: Tensor) -> Tensor:
    """Singular values of a matrix, descending, in float64.

    Args:
        W_OI: [O, I], any float dtype; upcast to float64 before the decomposition.

    Returns:
        [S] float64.
    """
    return torch.linalg.svdvals(W_OI.double())


def singular_values_of_gram(W_OI: Tensor) -> Tensor:
    """Singular values of a matrix, descending, as roots of the eigenvalues of its smaller Gram: faster, less exact.

    In float64 what is below 1e-8 of the largest is noise of that size: nothing to an effective rank.

    Args:
        W_OI: [O, I], any float dtype; upcast to float64 before the product.

    Returns:
        [S] float64.
    """
    W = W_OI.double()
    gram_SS = W @ W.mT if W.shape[0] <= W.shape[1] else W.mT @ W
    return torch.linalg.eigvalsh(gram_SS).clamp(min=0).sqrt().flip(0)


def stable_rank(s_S: Tensor) -> float:
    """(Frobenius norm / spectral norm)^2 = sum s^2 / max s^2; 0 for the zero matrix.

    Args:
        s_S: [S] singular values, any order.
    """
    top = s_S.max().item() if s_S.numel() else 0.0
    if top == 0.0:
        return 0.0
    return ((s_S.double() / top) ** 2).sum().item()


def effective_rank(s_S: Tensor) -> float:
    """exp of the entropy of the normalized singular values, p = s / sum s; 0 for the zero matrix.

    Args:
        s_S: [S] singular values, any order.

    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    total = s_S.double().sum()
    if s_S.numel() == 0 or total == 0:
        return 0.0
    p = s_S.double() / total
    return math.exp(-torch.special.xlogy(p, p).sum().item())


def rank_at_energy(s_S: Tensor, share: float) -> int:
    """Smallest r with sum_{i<=r} s_i^2 >= share * sum s^2; 0 for the zero matrix.

    Args:
        s_S: [S] singular values, descending.
        share: wanted share of the energy, 0 < share <= 1.
    """
    energy = s_S.double().square().cumsum(0)
    if energy.numel() == 0 or energy[-1] == 0:
        return 0
    # One ulp of slack, or share = 1 asks for more than the last partial sum can be.
    reached = energy >= share * energy[-1] * (1 - torch.finfo(torch.float64).eps)
    return int(reached.nonzero()[0].item()) + 1
