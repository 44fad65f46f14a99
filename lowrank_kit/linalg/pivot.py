"""The pivoted form of a product B A: R of its rows as they are, and coefficients that combine them to the others.

Shape legend: O out, I in, R rank. W = B A with B [O, R], A [R, I], and W = cat(rows, C rows)[index].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_kit.linalg.factor import working_dtype

# Coefficients end below 1 + this. Each swap makes the volume of the kept rows larger by more than that factor.
TOLERANCE = 0.01
# Random matrices of 512 to 3072 rows took less than 0.5 swaps for each kept row, most of them less than 0.1.
SWAPS_PER_ROW = 4


@dataclass(frozen=True)
class Pivoted:
    """W = cat(rows, coefficients @ rows)[index]: R (O + I) - R^2 numbers where two factors take R (O + I).

    Args:
        rows: [R, I], rows of W.
        coefficients: [O - R, R], what makes the other rows of them.
        index: [O] int32, where each row of W is in cat(rows, others).
    """

    rows: Tensor
    coefficients: Tensor
    index: Tensor

    def dense(self) -> Tensor:
        """W, [O, I]."""
        return torch.cat((self.rows, self.coefficients @ self.rows))[self.index]


def pivot(B_OR: Tensor, A_RI: Tensor) -> Pivoted:
    """The pivoted form of B A, with rows that make every coefficient at most about one in size.

    What rounding does to a kept row goes into the others multiplied by its coefficients: they have to be small. Rows
    start from a partially pivoted LU and are swapped until no coefficient exceeds 1 + TOLERANCE, which makes their
    volume a local maximum; should SWAPS_PER_ROW not suffice, a coefficient may stay above. B enters by an orthonormal
    basis of its columns, so its scale, its condition and even a lower rank make no difference.

    Args:
        B_OR: [O, R], any float dtype, R <= O.
        A_RI: [R, I].

    Returns:
        The form in the working dtype, on the device of B.

    Raises:
        ValueError: more columns than rows in B: there are not that many rows to keep.

    Source: maxvol, Goreinov et al., "How to find a good submatrix", 2010; PIFA, arXiv 2501.19090.
    """
    num_out, rank = B_OR.shape
    if rank > num_out:
        raise ValueError(f"rank must be at most the number of rows, {num_out}, got {rank}")
    dtype = working_dtype(rank, B_OR.device)
    B_OR, A_RI = B_OR.to(dtype), A_RI.to(dtype)
    basis_OR = torch.linalg.qr(B_OR).Q
    order_O = _lu_order(basis_OR)
    _swap(_coefficients(basis_OR, order_O), order_O)
    index_O = torch.empty_like(order_O, dtype=torch.int32)
    index_O[order_O] = torch.arange(num_out, dtype=torch.int32, device=index_O.device)
    # Solved anew: the swapped ones carry the rounding of every swap.
    return Pivoted(B_OR[order_O[:rank]] @ A_RI, _coefficients(basis_OR, order_O), index_O)


def expand(coefficients: Tensor, index_O: Tensor) -> Tensor:
    """The factor B of a pivoted form, W = B rows: identity rows and the coefficients, [O, R]."""
    rank = coefficients.shape[1]
    identity = torch.eye(rank, dtype=coefficients.dtype, device=coefficients.device)
    return torch.cat((identity, coefficients))[index_O]


def _lu_order(basis_OR: Tensor) -> Tensor:
    """[O] int64: the rows in the order in which partial pivoting takes them, those that it does not take last."""
    _, pivots_R = torch.linalg.lu_factor(basis_OR)
    order = list(range(len(basis_OR)))
    # As LAPACK has them: the k-th row was exchanged for the one of this number, counted from one.
    for k, other in enumerate(pivots_R.tolist()):
        order[k], order[other - 1] = order[other - 1], order[k]
    return torch.tensor(order, device=basis_OR.device)


def _coefficients(basis_OR: Tensor, order_O: Tensor) -> Tensor:
    """C [O - R, R] with C kept = others."""
    kept_RR, others = basis_OR[order_O].split((basis_OR.shape[1], len(order_O) - basis_OR.shape[1]))
    return torch.linalg.solve(kept_RR, others, left=False)


def _swap(C: Tensor, order_O: Tensor) -> None:
    """Exchange kept rows for others, the largest coefficient first; changes both arguments in place."""
    rank = C.shape[1]
    for _ in range(SWAPS_PER_ROW * rank if C.numel() else 0):
        i, j = divmod(int(C.abs().argmax()), rank)
        largest = C[i, j].item()
        if not abs(largest) > 1 + TOLERANCE:
            return
        row_R, column = C[i].clone(), C[:, j] / largest
        row_R[j] -= 1
        column[i] = 1 / largest
        # The kept row j takes the place of the other row i.
        C[i] = 0
        C[i, j] = 1
        C.addr_(column, row_R, alpha=-1)
        order_O[[j, rank + i]] = order_O[[rank + i, j]]
