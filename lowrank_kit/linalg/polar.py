"""The polar factor of a matrix: every singular value set to one.

Shape legend: the last two dimensions are a matrix, leading ones are a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Quintic coefficients of Keller Jordan's Muon: five steps send singular values in (0, 1] to about [0.7, 1.2].
# https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def newton_schulz(M: Tensor, *, steps: int = NEWTON_SCHULZ_STEPS, dtype: torch.dtype | None = None) -> Tensor:
    """Approximate polar factor by the quintic Newton-Schulz iteration of Muon.

    X <- a X + (b A + c A^2) X with A = X X^T, started at M / |M|_F.

    Args:
        M: [..., m, n] float.
        steps: number of iterations; 5 leaves singular values in about [0.7, 1.2], which Muon is tuned for.
        dtype: dtype of the products; None keeps float32 on CPU and takes bfloat16 elsewhere.

    Returns:
        [..., m, n] float32; zero for a zero matrix.

    Source: Jordan et al., "Muon", 2024. Deviation: float32 on CPU.
    """
    if dtype is None:
        dtype = torch.float32 if M.device.type == "cpu" else torch.bfloat16
    X = M.float()
    wide = X if X.shape[-2] <= X.shape[-1] else X.mT
    # The largest entry first: squares of tiny or huge entries leave the range of float32. The norm is then >= 1.
    wide = wide / wide.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    X = (wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1)).to(dtype)
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    X = X.float()
    return X if M.shape[-2] <= M.shape[-1] else X.mT
