"""Optimal rank-r factors of a matrix. Decompose once, truncate to any rank: factors are nested.

Shape legend: O out, I in, R rank, S = min(O, I), N tokens. W ~ B A with B [O, R], A [R, I].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# float64 up to this side on CPU; above it a decomposition in float64 takes hours.
FLOAT64_SIDE = 8192


@dataclass(frozen=True)
class Factors:
    """W ~ B A, directions in order of importance, so that a lower rank is a prefix.

    Args:
        B: [O, R], orthonormal columns.
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
        if not 1 <= rank <= self.A.shape[0]:
            raise ValueError(f"rank must be between 1 and {self.A.shape[0]}, got {rank}")
        return Factors(self.B[:, :rank], self.A[:rank], self.singular_values)

    def dense(self) -> Tensor:
        """B A, [O, I]."""
        return self.B @ self.A

    def relative_error(self, rank: int) -> float:
        """Weighted error of a rank, relative to the weighted norm: sqrt(sum_{i>r} s_i^2 / sum s_i^2)."""
        energy = self.singular_values.double().square()
        total = energy.sum().item()
        return (energy[rank:].sum().item() / total) ** 0.5 if total > 0 else 0.0


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

    With W H W^T = U S^2 U^T the optimum is B = U_r, A = U_r^T W: nothing is inverted, so a singular H is no trouble.
    Work is on the small side: for O <= I the eigenvectors of W H W^T, else the left singular vectors of W H^{1/2}.
    Full rank gives W back, also for inputs that the Gram has not seen.

    Args:
        W_OI: [O, I], any float dtype.
        gram_II: [I, I] sum over tokens of x x^T, symmetric positive semidefinite; any positive scale.

    Returns:
        Factors of full rank S in the working dtype; singular_values are those of W H^{1/2}.

    Source: SVD-LLM (arXiv 2403.07378) in the form of Swift-SVD (arXiv 2604.01609, eigenvectors of the output
    covariance).
    """
    num_out, num_in = W_OI.shape
    # The side that is decomposed: O of W H W^T for a wide matrix, I of H for a tall one.
    dtype = working_dtype(min(num_out, num_in), W_OI.device)
    W_OI, gram_II = W_OI.to(dtype), gram_II.to(dtype)
    if num_out <= num_in:
        energies, U = torch.linalg.eigh(W_OI @ gram_II @ W_OI.mT)
        s_S = energies.clamp(min=0).sqrt().flip(0)
        U_OS = U.flip(1)
    else:
        eigenvalues, Q = torch.linalg.eigh(gram_II)
        # Never below the rounding of eigh: what W does to unseen inputs comes last, but it is among the directions.
        floor = torch.finfo(dtype).eps * num_in * eigenvalues[-1].clamp(min=0)
        root = Q * eigenvalues.clamp(min=floor).sqrt()
        U_OS, s_S, _ = torch.linalg.svd(W_OI @ root, full_matrices=False)
    return Factors(U_OS, U_OS.mT @ W_OI, s_S)
