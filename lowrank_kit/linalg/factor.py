"""Optimal rank-r factors of a matrix. Decompose once, truncate to any rank: factors are nested.

Shape legend: O out, I in, R rank, S = min(O, I), N tokens. W ~ B A with B [O, R], A [R, I].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# float64 up to this side on CPU; above it a decomposition in float64 takes hours.
FLOAT64_SIDE = 8192
# Of a matrix that is gone through without a copy of it as a whole.
ROWS = 512


@dataclass(frozen=True)
class Factors:
    """W ~ B A, directions in order of importance, so that a lower rank is a prefix.

    Those of a stack of matrices have one dimension more in front, see `stacked`.

    Args:
        B: [O, R], orthonormal columns unless said otherwise.
        A: [R, I].
        singular_values: [S] of the weighted matrix, descending: the weighted error of rank r is the root of
            the sum of squares from r on.
    """

    B: Tensor
    A: Tensor
    singular_values: Tensor

    def truncate(self, rank: int) -> Factors:
        """The best factors of a lower rank: a slice, no work.

        Raises:
            ValueError: rank below 1 or above the rank that is there.
        """
        if not 1 <= rank <= self.A.shape[-2]:
            raise ValueError(f"rank must be between 1 and {self.A.shape[-2]}, got {rank}")
        return Factors(self.B[..., :rank], self.A[..., :rank, :], self.singular_values)

    def float32(self) -> Factors:
        """The same in half the memory; singular values as they are."""
        return Factors(self.B.float(), self.A.float(), self.singular_values)

    def dense(self) -> Tensor:
        """B A, [O, I]."""
        return self.B @ self.A

    def relative_error(self, rank: int) -> float:
        """Weighted error of a rank, relative to the weighted norm: sqrt(sum_{i>r} s_i^2 / sum s_i^2)."""
        energy = self.singular_values.double().square()
        total = energy.sum().item()
        return (energy[rank:].sum().item() / total) ** 0.5 if total > 0 else 0.0


def stacked(factors: Sequence[Factors]) -> Factors:
    """Factors of several matrices of one shape as one: B [E, O, R], A [E, R, I].

    Singular values are such that energies add up: the root of the sum of squares at each index.
    """
    values = torch.stack([one.singular_values for one in factors]).square().sum(0).sqrt()
    return Factors(torch.stack([one.B for one in factors]), torch.stack([one.A for one in factors]), values)


def weighted_error(W_OI: Tensor, approximation_OI: Tensor, gram_II: Tensor | None = None) -> float:
    """|(W' - W) H^{1/2}|_F / |W H^{1/2}|_F: relative error of the outputs, or of the weights where H is None.

    The difference is taken in the working dtype; its energy, of which some 6 digits are enough, in float32.

    Args:
        W_OI: [O, I], any float dtype; or several of them in one more dimension in front, whose energies are summed.
        approximation_OI: W', [O, I], any float dtype.
        gram_II: H, [I, I], symmetric positive semidefinite; any positive scale.

    Returns:
        0 for an exact W' and infinity for another one of a W without outputs.
    """
    dtype = working_dtype(min(W_OI.shape[-2:]), W_OI.device)
    difference_OI = torch.empty_like(W_OI, dtype=dtype)
    for out, other, W in zip(*(M.split(ROWS, -2) for M in (difference_OI, approximation_OI, W_OI)), strict=True):
        torch.sub(other.to(dtype), W.to(dtype), out=out)
    del approximation_OI
    error, total = (_energy(M, gram_II) for M in (difference_OI, W_OI))
    if total == 0:
        return float("inf") if error > 0 else 0.0
    return (error / total) ** 0.5


def _energy(M_OI: Tensor, gram_II: Tensor | None) -> float:
    """tr(M H M^T) for the H of largest number 1, summed over all M of a stack."""
    # Of size one: no square of a number in float32 is too large or too small.
    size, total = _size(M_OI), 0.0
    if gram_II is None:
        for M_RI in M_OI.split(ROWS, -2):
            total += (M_RI / size).float().square().sum(dtype=torch.float64).item()
        return total * size**2
    scaled_OI = torch.empty_like(M_OI, dtype=torch.float32)
    for scaled_RI, M_RI in zip(scaled_OI.split(ROWS, -2), M_OI.split(ROWS, -2), strict=True):
        scaled_RI.copy_(M_RI / size)
    gram_size = _size(gram_II)
    for M_OR, gram_IR in zip(scaled_OI.split(ROWS, -1), gram_II.split(ROWS, -1), strict=True):
        weighted_OR = scaled_OI @ (gram_IR / gram_size).float()
        total += (weighted_OR * M_OR).sum(dtype=torch.float64).item()
    # Rounding may leave a sum of zeros just below zero.
    return max(total, 0.0) * size**2


def _size(tensor: Tensor) -> float:
    return max(*(abs(end.item()) for end in tensor.aminmax()), tiny(tensor))


def tiny(tensor: Tensor) -> float:
    """Smallest number of full precision in the dtype of a tensor."""
    return torch.finfo(tensor.dtype).tiny


def working_dtype(side: int, device: torch.device) -> torch.dtype:
    """dtype of a decomposition: float64 on CPU up to FLOAT64_SIDE, else float32."""
    return torch.float64 if side <= FLOAT64_SIDE and device.type == "cpu" else torch.float32


def truncated_svd(W_OI: Tensor) -> Factors:
    """All nested factors that minimize |W - B A|_F: B = U, A = U^T W.

    Args:
        W_OI: [O, I], any float dtype.

    Returns:
        Factors of full rank S in the working dtype.

    Source: Eckart and Young, 1936.
    """
    W_OI = W_OI.to(working_dtype(min(W_OI.shape), W_OI.device))
    U_OS, s_S, _ = torch.linalg.svd(W_OI, full_matrices=False)
    return Factors(U_OS, U_OS.mT @ W_OI, s_S)


def whitened_svd(W_OI: Tensor, gram_II: Tensor) -> Factors:
    """All nested factors that minimize the output error |(W - B A) X|_F, given the Gram H = X X^T.

    The optimum is B = U_r, A = U_r^T W with the left singular vectors U of W H^{1/2}: nothing is inverted, so a
    singular H is no trouble. One symmetric eigendecomposition of the small side: of W H W^T for O <= I, else of
    R^T W^T W R with H = R R^T, whose eigenvectors V give U as the orthonormal basis of W R V.
    Full rank gives W back, also for inputs that the Gram has not seen.

    Args:
        W_OI: [O, I], any float dtype.
        gram_II: [I, I] sum over tokens of x x^T, symmetric positive semidefinite; any positive scale.

    Returns:
        Factors of full rank S in the working dtype; singular_values are those of W H^{1/2}. What is below the root
        of the dtype's rounding, relative to the largest, is noise of that size.

    Source: SVD-LLM (arXiv 2403.07378) in the form of Swift-SVD (arXiv 2604.01609, eigenvectors of the output
    covariance).
    """
    num_out, num_in = W_OI.shape
    dtype = working_dtype(min(num_out, num_in), W_OI.device)
    W_OI, gram_II = W_OI.to(dtype), gram_II.to(dtype)
    if num_out <= num_in:
        energies, U = torch.linalg.eigh(W_OI @ gram_II @ W_OI.mT)
        U_OS = U.flip(1)
    else:
        root_II = _root(gram_II)
        energies, V = torch.linalg.eigh(root_II.mT @ (W_OI.mT @ W_OI) @ root_II)
        images_OS = W_OI @ (root_II @ V.flip(1))
        del root_II, V  # what follows takes as much again
        # Householder's: columns of no length still get directions of their own, and a prefix spans a prefix.
        U_OS = torch.linalg.qr(images_OS)[0]
        del images_OS
    return Factors(U_OS, U_OS.mT @ W_OI, energies.clamp(min=0).sqrt().flip(0))


def scaled_svd(W_OI: Tensor, gram_II: Tensor, exponent: float = 0.5) -> Factors:
    """All nested factors that minimize |(W - B A) D|_F with D_ii = (root of the mean square of input i)^exponent.

    Args:
        W_OI: [O, I], any float dtype.
        gram_II: [I, I] sum over tokens of x x^T; any positive scale.
        exponent: 0 is the plain SVD, 1 the Gram without its off-diagonal.

    Returns:
        Factors of full rank S in the working dtype; singular_values are those of W D for the scale of the Gram.

    Source: ASVD (arXiv 2312.05821), eq. 5-7. It takes the mean of |x| where this takes the root of the mean square.
    """
    W_OI = W_OI.to(working_dtype(min(W_OI.shape), W_OI.device))
    # Never zero: a direction of W that only unseen inputs reach comes last, but it is among the directions.
    energy_I = gram_II.diagonal().to(W_OI.dtype)
    floor = torch.finfo(W_OI.dtype).eps * energy_I.max()
    scale_I = energy_I.clamp(min=floor).pow(exponent / 2) if floor > 0 else torch.ones_like(energy_I)
    U_OS, s_S, _ = torch.linalg.svd(W_OI * scale_I, full_matrices=False)
    return Factors(U_OS, U_OS.mT @ W_OI, s_S)


def two_sided_svd(W_OI: Tensor, gram_II: Tensor, output_gram_OO: Tensor, damping: float) -> Factors:
    """All nested factors that minimize |G^{1/2} (W - B A) H^{1/2}|_F, errors weighed by what they do to the loss.

    With G = L L^T and the left singular vectors U of L^T W H^{1/2}: B = L^{-T} U_r, A = U_r^T L^T W.

    Args:
        W_OI: [O, I], any float dtype.
        gram_II: [I, I] sum over tokens of x x^T; any positive scale.
        output_gram_OO: [O, O] sum over tokens of g g^T, g the gradient of the loss by the output; any positive scale.
        damping: share of the mean of G's diagonal that is added to it, above 0.

    Returns:
        Factors of full rank S in the working dtype; B is not orthonormal, B^T G B nearly is.

    Source: K-FAC's curvature; OBD-LLM (arXiv 2604.00821) and IO-SVD (arXiv 2605.15626) weigh both sides.
    """
    dtype = working_dtype(min(W_OI.shape), W_OI.device)
    W_OI = W_OI.to(dtype)
    L_OO = torch.linalg.cholesky(ridged(output_gram_OO.to(dtype), damping))
    inner = whitened_svd(L_OO.mT @ W_OI, gram_II)
    B_OS = torch.linalg.solve_triangular(L_OO.mT, inner.B, upper=True)
    return Factors(B_OS, inner.A, inner.singular_values)


def anchored_target(W_OI: Tensor, gram_II: Tensor, cross_II: Tensor, blend: float, ridge: float) -> Tensor:
    """The weight whose outputs on changed inputs are nearest to the wanted ones.

    Minimizes |W [(1 - b) Y + b X] - W' Y|^2 + ridge |W' - W|^2 over all W', for inputs X of the dense and Y of the
    changed model: W' = W + b W (X Y^T - Y Y^T) (Y Y^T + ridge)^{-1}. A ridge toward W: without text it is W.

    Args:
        W_OI: [O, I], any float dtype.
        gram_II: [I, I], Y Y^T.
        cross_II: [I, I], X Y^T.
        blend: b, 0 <= b <= 1.
        ridge: share of the mean of the Gram's diagonal, above 0.

    Returns:
        [O, I], and the Gram with the ridge is `ridged(gram_II, ridge)`: the weight of its errors.

    Source: AA-SVD (arXiv 2604.02119) has b of 0 and 1, SAES-SVD (arXiv 2602.03051) b between; the ridge is MPIFA's.
    """
    dtype = working_dtype(W_OI.shape[1], W_OI.device)
    W_OI, gram_II, cross_II = W_OI.to(dtype), gram_II.to(dtype), cross_II.to(dtype)
    change_IO = (W_OI @ (cross_II - gram_II)).mT
    L_II = torch.linalg.cholesky(ridged(gram_II, ridge))
    return W_OI + blend * torch.cholesky_solve(change_IO, L_II).mT


def ridged(gram_II: Tensor, ridge: float) -> Tensor:
    """H + ridge mean(diag H) I, for H of zeros ridge I."""
    mean = gram_II.diagonal().mean()
    added = ridge * torch.where(mean > 0, mean, 1.0)
    return gram_II + added * torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)


def tail_scores(factors: Factors, gram_II: Tensor, output_gram_OO: Tensor) -> Tensor:
    """What each direction adds to tr(G (W - B_r A_r) H (W - B_r A_r)^T) when it is the last to go, [S].

    Sums from r on are the weighted error of rank r. Not the square of `singular_values`, unless the factors were
    made for these weights.

    Args:
        factors: of full rank S; of a stack, of which the sum over its matrices is given.
        gram_II: [I, I].
        output_gram_OO: [O, O].
    """
    dtype = factors.B.dtype
    outer_SS = factors.B.mT @ output_gram_OO.to(dtype) @ factors.B
    products_SS = outer_SS * (factors.A @ gram_II.to(dtype) @ factors.A.mT)
    scores_S = 2 * products_SS.triu().sum(-1) - products_SS.diagonal(dim1=-2, dim2=-1)
    return scores_S.flatten(0, -2).sum(0) if scores_S.ndim > 1 else scores_S


def _root(gram_II: Tensor) -> Tensor:
    """R with R R^T = H, up to rounding added to the diagonal so that what the Gram has not seen is not lost."""
    eps = torch.finfo(gram_II.dtype).eps
    lifted_II = ridged(gram_II, eps * len(gram_II))
    root_II, failed = torch.linalg.cholesky_ex(lifted_II)
    if not failed:
        return root_II
    eigenvalues, Q = torch.linalg.eigh(lifted_II)
    return Q * eigenvalues.clamp(min=eps * eigenvalues[-1]).sqrt()
