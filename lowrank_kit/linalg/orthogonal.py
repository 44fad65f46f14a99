"""Orthonormal columns by products and Cholesky factors, where that is safe: cheaper than QR, and fast on a GPU.

Shape legend: the last two dimensions are a matrix [m, b], m >= b; leading ones are a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_kit.linalg.shards import WHOLE, Shards

# Largest |Q^T Q - I|_2 that passes: float32 leaves about 1e-6 where nothing is lost.
_TOLERANCE = 1e-5
_PROBES = 2
_POWER_STEPS = 3


def orthonormalize(Y: Tensor, shards: Shards = WHOLE) -> tuple[Tensor, Tensor]:
    """Q, R with Y = Q R, the columns of Q orthonormal and R upper triangular: Cholesky QR of equilibrated columns.

    Y^T Y = D L L^T D with D the norms of the columns, R = L^T D, Q = Y R^-1; once more where columns are close to
    dependent (CholeskyQR2), and Householder QR where they are closer still. A basis of singular vectors times its
    matrix, whose columns differ in size but little in direction from orthogonal ones, needs one pass. The order of
    columns is kept: the leading j columns of Q span those of Y.

    Args:
        Y: [..., m, b] float32 or float64, m >= b, finite.
        shards: how the rows are spread; Y then has those of this process, and m is theirs together.

    Returns:
        Q [..., m, b], rows as those of Y, and R [..., b, b]; its diagonal is positive, but of either sign after
        Householder QR.

    Source: Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, "Roundoff error analysis of the CholeskyQR2 algorithm", 2015.
    Deviation: equilibrated columns (van der Sluis, 1969), and the second pass only where it is needed.
    """
    peak = shards.max(largest_entry(Y)).clamp(min=torch.finfo(Y.dtype).tiny)
    scaled = Y / peak
    Q, R = _cholesky_pass(scaled, shards)
    if not _departure(Q, shards) < _TOLERANCE:
        Q, R_2 = _cholesky_pass(Q, shards)
        R = R_2 @ R
        if not _departure(Q, shards) < _TOLERANCE:
            Q, R = torch.linalg.qr(scaled) if shards is WHOLE else _tall_skinny_qr(scaled, shards)
    return Q, R * peak


def largest_entry(Y: Tensor) -> Tensor:
    """max |Y| of each matrix, [..., 1, 1]; 0 where it has no entries, as the shard of a process may."""
    if not Y.numel():
        return Y.new_zeros(*Y.shape[:-2], 1, 1)
    return Y.abs().amax(dim=(-2, -1), keepdim=True)


def _cholesky_pass(Y: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """Q and R by the Cholesky factor of the equilibrated Gram; anything, NaN too, where that breaks down."""
    gram = shards.sum(Y.mT @ Y)
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()[..., None, :].clamp(min=torch.finfo(Y.dtype).tiny)
    L, _info = torch.linalg.cholesky_ex(gram / norms / norms.mT)
    R = L.mT * norms
    return torch.linalg.solve_triangular(R, Y, upper=True, left=False), R


def _departure(Q: Tensor, shards: Shards) -> float:
    """|Q^T Q - I|_2 of the worst matrix, by a few steps of the power method on a few vectors; NaN where Q is."""
    probes = torch.randn(Q.shape[-1], _PROBES, generator=torch.Generator().manual_seed(0))
    x = probes.to(Q).expand(*Q.shape[:-2], -1, -1)
    for _ in range(_POWER_STEPS):
        x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp(min=torch.finfo(Q.dtype).tiny)
        x = shards.sum(Q.mT @ (Q @ x)) - x
    return torch.linalg.vector_norm(x, dim=-2).amax().item() if x.numel() else 0.0


def _tall_skinny_qr(Y: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """Householder QR of spread rows: of each part, then of their triangles one below the other.

    Source: Demmel, Grigori, Hoemmen, Langou, "Communication-optimal parallel and sequential QR" (arXiv 0806.2159).
    """
    columns = Y.shape[-1]
    part, triangle = torch.linalg.qr(Y)
    missing = columns - triangle.shape[-2]  # of a process with fewer rows than columns
    triangles = shards.stack(torch.nn.functional.pad(triangle, (0, 0, 0, missing)))
    top, R = torch.linalg.qr(triangles)
    own = top[..., shards.index * columns :, :][..., : part.shape[-1], :]
    return part @ own, R
