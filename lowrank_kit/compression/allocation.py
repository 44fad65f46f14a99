"""Budget -> one rank per matrix. A new allocation is a function and a line in the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from lowrank_kit.matrices import Matrix


def uniform(matrices: Sequence[Matrix], keep: float) -> list[int]:
    """The same keep for every matrix: the largest r with r (m + n) <= keep m n, at least 1."""
    # In fractions: 0.09 in binary is a little less, and 0.09 x 40 x 50 / 90 = 2 would fold to rank 1.
    share = Fraction(str(keep))
    return [max(1, math.floor(share * m * n / (m + n))) for m, n in (matrix.shape for matrix in matrices)]


def factor_numbers(shape: tuple[int, int], rank: int) -> int:
    """Numbers stored for factors of a matrix: r (m + n), and the sentinel."""
    return rank * (shape[0] + shape[1]) + 1


def saves(shape: tuple[int, int], rank: int) -> bool:
    """Whether factors of this rank take fewer numbers than the matrix."""
    return factor_numbers(shape, rank) < shape[0] * shape[1]


ALLOCATIONS: dict[str, Callable[[Sequence[Matrix], float], list[int]]] = {"uniform": uniform}
