"""Grams: sums over tokens of outer products, half of the work left out where the result is symmetric.

Shape legend: N tokens, I in.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# Panels of the symmetric product: (panels + 1) / (2 panels) of the full product is computed.
PANELS = 4
# Narrower panels lose in speed what they save in work.
NARROWEST = 96
# Mirrored together, which takes memory for a square of them.
MIRRORED_ROWS = 512


def zero_gram(side: int, device: torch.device) -> Tensor:
    """The empty sum, [side, side], in float64 where the device has it."""
    return torch.zeros(side, side, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)


def add_gram_(total_II: Tensor, x_NI: Tensor) -> Tensor:
    """Add the upper triangle of X^T X to a sum; `mirror_` makes the sum whole at the end.

    Products are made in float32 or better and added in the dtype of the sum. The diagonal is finite if and only if
    all of the sum is.

    Args:
        total_II: [I, I], changed in place; what is below the diagonal is of no account.
        x_NI: [N, I], any float dtype.
    """
    x_NI = at_least_float32(x_NI)
    num_in = x_NI.shape[1]
    panels = max(1, min(PANELS, num_in // NARROWEST))
    edges = [num_in * i // panels for i in range(panels + 1)]
    for begin, end in itertools.pairwise(edges):
        total_II[begin:end, begin:] += x_NI[:, begin:end].mT @ x_NI[:, begin:]
    return total_II


def mirror_(total_II: Tensor) -> Tensor:
    """The symmetric matrix of an upper triangle, in its place: of a large one, another is not to be in memory.

    Args:
        total_II: [I, I], changed in place.
    """
    for begin in range(0, len(total_II), MIRRORED_ROWS):
        end = begin + MIRRORED_ROWS
        square = total_II[begin:end, begin:end]
        square.copy_(square.triu() + square.triu(1).mT)
        total_II[end:, begin:end] = total_II[begin:end, end:].mT
    return total_II


def at_least_float32(x: Tensor) -> Tensor:
    """Numbers of 16 bits in float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
