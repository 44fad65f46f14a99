"""The matrices that every decomposition has to survive: the contract table of `linalg`."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal(rows: int, columns: int) -> Tensor:
    """Random orthonormal columns, [rows, columns] float64."""
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


def with_spectrum(rows: int, columns: int, singular_values: Tensor) -> Tensor:
    """A random matrix with the given min(rows, columns) singular values, [rows, columns] float64."""
    side = min(rows, columns)
    return (orthonormal(rows, side) * singular_values.double()) @ orthonormal(columns, side).mT


# Name -> (matrix in float64, its rank).
CASES = {
    "tall": lambda: (torch.randn(14, 6, dtype=torch.float64), 6),
    "wide": lambda: (torch.randn(6, 14, dtype=torch.float64), 6),
    "square": lambda: (torch.randn(8, 8, dtype=torch.float64), 8),
    "rank one": lambda: (torch.outer(torch.arange(1.0, 8.0), torch.arange(1.0, 6.0)).double(), 1),
    "zero": lambda: (torch.zeros(5, 9, dtype=torch.float64), 0),
    # Two on the diagonal: exact in every dtype.
    "duplicate singular values": lambda: (2 * torch.eye(6, 9, dtype=torch.float64), 6),
    "single row": lambda: (torch.randn(1, 9, dtype=torch.float64), 1),
    "single column": lambda: (torch.randn(9, 1, dtype=torch.float64), 1),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
