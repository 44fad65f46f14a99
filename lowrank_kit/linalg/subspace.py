"""The rank-k step from a subspace of a few more than k columns: warm-started, or by block Krylov.

Shape legend: the last two dimensions are a matrix [m, n], leading ones are a batch. Inside, matrices are tall:
L = max(m, n), S = min(m, n); b columns span the subspace, k <= b <= S.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_kit.linalg.orthogonal import largest_entry, orthonormalize
from lowrank_kit.linalg.polar import polar_express
from lowrank_kit.linalg.shards import WHOLE, Shards
from lowrank_kit.linalg.topk import peak_scaled, topk_polar

OVERSAMPLING = 0.1
# Columns beyond the share, so that a small k has room too: at k = 19 of 384, 8 of them gave an LMO ratio of 0.990 at
# worst and 16 gave 0.995, on momentum of a language model.
_LEAST_OVERSAMPLING = 16
_COLD_ITERATIONS = 3
# Where eigh is slow, QR sweeps stand in for it: four come within 0.002 of the LMO ratio that it gives.
_SWEEPS = 4
_SMALL_POLAR_STEPS = 8
KRYLOV_BLOCKS = 2
KRYLOV_OVERSAMPLING = 8


def basis_columns(k: int, side: int, oversampling: float = OVERSAMPLING) -> int:
    """b = k + ceil(oversampling k) + 16, at most min(m, n).

    Args:
        k: rank of the step.
        side: min(m, n).
        oversampling: further columns as a share of k.
    """
    return min(side, k + math.ceil(oversampling * k) + _LEAST_OVERSAMPLING)


def random_basis(side: int, columns: int, seed: int) -> Tensor:
    """Standard normal [side, columns] float32 on the CPU: the same on every device and every rank."""
    return torch.randn(side, columns, generator=torch.Generator().manual_seed(seed))


def warm_topk_polar(
    M: Tensor,
    k: int,
    basis: Tensor,
    *,
    cold: bool = False,
    factorize: bool | None = None,
    dtype: torch.dtype | None = None,
    rows: Shards = WHOLE,
    columns: Shards = WHOLE,
    shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """U_k V_k^T of M by one step of subspace iteration from the basis of the step before, and the new basis.

    With M tall: P = orth(M V), Z = M^T P, X = eigenvectors of Z^T Z by falling eigenvalue (Rayleigh-Ritz),
    V' = orth(Z X), step = (P X_k) V'_k^T. Rank <= k and singular values 0 or 1 by construction; how close the step is
    to the exact one shows in `lmo_ratio`. Where eigh is slow, X is by sweeps X <- orth(Z^T Z X), and the k x k polar
    factor that the sweeps leave is by Polar Express.

    Args:
        M: [..., m, n] float.
        k: 1 <= k <= S.
        basis: [..., S, b], k <= b <= S, any float dtype: right singular vectors on the smaller side, largest first,
            as an earlier call gave them, or `random_basis`.
        cold: the basis is random: three iterations instead of one.
        factorize: find X by eigh; None is on the CPU.
        dtype: of the three large products; None is float32 on the CPU and bfloat16 elsewhere.
        rows, columns: how those of M are spread over processes, one of the two at most. Where it is the smaller side,
            the rows of the basis are spread as it is. M itself is never gathered: about 2 b n + 2 b^2 numbers are
            summed, n being the other side.
        shape: (m, n) of the whole M where it is spread.

    Returns:
        The step [..., m, n] float32, and the basis [..., S, b] float32 for the next call. Directions below
        eps * max(m, n) of the largest get no step, and random columns in the basis.

    Source: subspace iteration with Rayleigh-Ritz and oversampling as in Halko, Martinsson, Tropp (arXiv 0909.4061),
    algorithm 4.4 and section 5, warm-started as in Dion (arXiv 2504.05295). Deviation from NuMuon (arXiv 2603.03597),
    which takes a block Krylov method: see `krylov_topk_polar`.
    """
    m, n = shape or M.shape[-2:]
    tall = m >= n
    long, short = (rows, columns) if tall else (columns, rows)
    on_cpu = M.device.type == "cpu"
    factorize = on_cpu if factorize is None else factorize
    dtype = dtype or (torch.float32 if on_cpu else torch.bfloat16)
    operand = (M if tall else M.mT).float().to(dtype)
    V = basis.float()
    for _ in range(_COLD_ITERATIONS - 1 if cold else 0):
        P, _R = orthonormalize(short.sum(_product(operand, V)), long)
        V, _R = orthonormalize(long.sum(_product(operand.mT, P)), short)
    P, _R = orthonormalize(short.sum(_product(operand, V)), long)
    Z = long.sum(_product(operand.mT, P))
    left, right, new_basis = _rayleigh_ritz(P, Z, k, max(m, n), short, factorize=factorize)
    step = _product(left.to(dtype), right.mT)
    return (step if tall else step.mT), new_basis


def krylov_topk_polar(M: Tensor, k: int, seed: int = 0) -> Tensor:
    """U_k V_k^T of M by randomized block Krylov, as NuMuon has it: two blocks of k + 8 columns from a cold start.

    With M tall: B_1 = orth(M^T M G), B_2 = orth(M^T M B_1), Q = orth([B_1, B_2]), and the exact step of M Q, turned
    back by Q^T. Where the blocks would span the whole side it is the exact step of M.

    Args:
        M: [..., m, n] float.
        k: 1 <= k <= S.
        seed: of the Gaussian block G, one for the whole batch.

    Returns:
        [..., m, n] float32.

    Source: NuMuon (arXiv 2603.03597), L = 2 and oversampling 8 as in its re-implementations; Musco and Musco
    (arXiv 1504.05477), algorithm 2.
    """
    tall = peak_scaled(M if M.shape[-2] >= M.shape[-1] else M.mT).float()
    side = tall.shape[-1]
    columns = k + KRYLOV_OVERSAMPLING
    if KRYLOV_BLOCKS * columns >= side:
        return topk_polar(M.float(), k)
    block = random_basis(side, columns, seed).to(M.device).expand(*M.shape[:-2], side, columns)
    blocks = []
    for _ in range(KRYLOV_BLOCKS):
        block = torch.linalg.qr(tall.mT @ (tall @ block)).Q
        blocks.append(block)
    Q = torch.linalg.qr(torch.cat(blocks, dim=-1)).Q
    step = topk_polar(tall @ Q, k) @ Q.mT
    return step if M.shape[-2] >= M.shape[-1] else step.mT


def _rayleigh_ritz(
    P: Tensor, Z: Tensor, k: int, longest: int, shards: Shards, *, factorize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Left and right factor of the step and the next basis, from P [L, b] orthonormal and Z = M^T P [S, b]."""
    Z = Z / shards.max(largest_entry(Z)).clamp(min=torch.finfo(Z.dtype).tiny)
    C = shards.sum(Z.mT @ Z)
    if factorize:
        X = torch.linalg.eigh(C).eigenvectors.flip(-1)
    else:
        X = torch.eye(C.shape[-1], device=C.device).expand_as(C)
        for _ in range(_SWEEPS):
            X, _R = orthonormalize(C @ X)
    # Orthonormalized, not divided by its singular values: those of Z^T Z in float32 are wrong below 3e-4 of the first.
    V, R = orthonormalize(Z @ X, shards)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    threshold = torch.finfo(torch.float32).eps * longest * diagonal.abs().amax(dim=-1, keepdim=True)
    alive = (diagonal.abs() > threshold)[..., None, :]
    signs = diagonal.sign()[..., None, :k]
    left, right = (P @ X[..., :k]) * alive[..., :k], V[..., :k] * signs
    if not factorize:
        # The sweeps leave R_k near diagonal, not diagonal: M restricted to the subspace is (P X_k) R_k^T V_k^T.
        right = right @ polar_express(signs.mT * R[..., :k, :k], steps=_SMALL_POLAR_STEPS, dtype=torch.float32)
    if not alive.all():
        V = torch.where(alive, V, random_basis(V.shape[-2], V.shape[-1], seed=shards.index).to(V.device))
    return left, right, V


def _product(A: Tensor, B: Tensor) -> Tensor:
    """A B in the dtype of A, as float32."""
    return (A @ B.to(A.dtype)).float()
