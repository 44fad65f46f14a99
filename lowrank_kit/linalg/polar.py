"""The polar factor of a matrix, every singular value set to one, by matrix products alone.

Shape legend: the last two dimensions are a matrix, leading ones are a batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lowrank_kit.linalg.topk import peak_scaled

# Quintic coefficients of Keller Jordan's Muon: five steps send singular values in (0, 1] to about [0.7, 1.2].
# https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Smallest singular value, relative to the Frobenius norm, that Polar Express still sends to one: as in its paper.
POLAR_EXPRESS_FLOOR = 1e-3
POLAR_EXPRESS_STEPS = 6
# Rounding in bfloat16 pushes singular values past 1, where the polynomials grow fast: each but the last sees x / 1.01.
_BFLOAT16_MARGIN = 1.01

Quintic = tuple[float, float, float]


def newton_schulz(M: Tensor, *, steps: int = NEWTON_SCHULZ_STEPS, dtype: torch.dtype | None = None) -> Tensor:
    """Approximate polar factor by the quintic Newton-Schulz iteration of Muon.

    X <- a X + (b A + c A^2) X with A = X X^T, started at M / |M|_F.

    Args:
        M: [..., m, n] float.
        steps: number of iterations; 5 leaves singular values in about [0.7, 1.2], which Muon is tuned for.
        dtype: dtype of the products; None takes float32 or better on CPU and bfloat16 elsewhere.

    Returns:
        [..., m, n] float32 or better; zero for a zero matrix.

    Source: Jordan et al., "Muon", 2024. Deviation: float32 on CPU.
    """
    return _iterate(M, [NEWTON_SCHULZ_COEFFICIENTS] * steps, dtype)


def polar_express(
    M: Tensor,
    *,
    steps: int = POLAR_EXPRESS_STEPS,
    floor: float = POLAR_EXPRESS_FLOOR,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Polar factor by the odd quintics that are best one after the other: at the cost of Newton-Schulz, closer to 1.

    X <- a_t X + (b_t A + c_t A^2) X with A = X X^T, started at M / |M|_F.

    Args:
        M: [..., m, n] float.
        steps: number of iterations; with 6, singular values above `floor` come out within 1 % of 1.
        floor: smallest singular value that matters, relative to |M|_F.
        dtype: dtype of the products; None takes float32 or better on CPU and bfloat16 elsewhere.

    Returns:
        [..., m, n] float32 or better; zero for a zero matrix.

    Source: Amsel, Persson, Musco, Gower, "The Polar Express" (arXiv 2505.16932), theorem 3.1 and section 3.4.
    Deviation: coefficients without the paper's cushion; the safety factor only in bfloat16.
    """
    dtype = _product_dtype(M, dtype)
    margin = _BFLOAT16_MARGIN if dtype == torch.bfloat16 else 1.0
    *first, last = polar_express_quintics(steps, floor)
    scaled = [(a / margin, b / margin**3, c / margin**5) for a, b, c in first]
    return _iterate(M, [*scaled, last], dtype)


@lru_cache(maxsize=32)
def polar_express_quintics(steps: int, floor: float) -> tuple[Quintic, ...]:
    """Coefficients (a, b, c) of p(x) = a x + b x^3 + c x^5, each with the least max |1 - p| on what the last one left.

    Args:
        steps: how many.
        floor: lower end l of the interval [l, 1] that the first one faces.
    """
    lower, found = floor, []
    upper = 1.0
    for _ in range(steps):
        a, b, c = _best_quintic(lower, upper)
        found.append((a, b, c))
        # The least value is at the lower end, and the largest as far above 1 as that is below.
        lower = a * lower + b * lower**3 + c * lower**5
        upper = 2 - lower
    return tuple(found)


def _best_quintic(lower: float, upper: float) -> Quintic:
    """The odd quintic closest to 1 on [lower, upper], by Remez exchange: the error alternates at four points."""
    if upper - lower < 1e-5 * upper:  # the exchange points fall together; here the limit is exact to rounding
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    inner = np.array([0.75 * lower + 0.25 * upper, 0.25 * lower + 0.75 * upper])
    for _ in range(100):
        x = np.array([lower, *inner, upper])
        a, b, c, _error = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1), np.ones(4))
        # Extrema of p: a + 3 b x^2 + 5 c x^4 = 0.
        root = np.sqrt(9 * b * b - 20 * a * c)
        moved = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
        if np.abs(moved - inner).max() < 1e-14:
            break
        inner = moved
    return float(a), float(b), float(c)


def _product_dtype(M: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (torch.promote_types(M.dtype, torch.float32) if M.device.type == "cpu" else torch.bfloat16)


def _iterate(M: Tensor, quintics: Iterable[Quintic], dtype: torch.dtype | None) -> Tensor:
    """The polynomials, one after the other, of the singular values of M / |M|_F."""
    wide = peak_scaled(M if M.shape[-2] <= M.shape[-1] else M.mT)  # of a norm >= 1
    X = (wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1)).to(_product_dtype(M, dtype))
    for a, b, c in quintics:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    X = X.to(wide.dtype)
    return X if M.shape[-2] <= M.shape[-1] else X.mT
