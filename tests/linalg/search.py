"""The best factors that a search finds, for what closed forms claim to be the optimum of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def activations(num_in: int, tokens: int = 40) -> Tensor:
    """Correlated inputs, [num_in, tokens] float64, on scales from 1 to 1 / num_in."""
    scales = 1 / torch.arange(1, num_in + 1, dtype=torch.float64)
    mixing = torch.randn(num_in, num_in, dtype=torch.float64)
    return mixing @ (scales[:, None] * torch.randn(num_in, tokens, dtype=torch.float64))


def best_found(error: Callable[[Tensor], Tensor], shape: tuple[int, int], rank: int, starts: int = 3) -> float:
    """Smallest error(B A) that gradient descent on A and B finds: L-BFGS in float64 from several starts.

    Args:
        error: of a matrix [O, I], a number.
        shape: (O, I).
    """
    errors = []
    for _ in range(starts):
        B = torch.randn(shape[0], rank, dtype=torch.float64, requires_grad=True)
        A = torch.randn(rank, shape[1], dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS(
            [A, B], max_iter=500, tolerance_grad=1e-11, tolerance_change=1e-15, line_search_fn="strong_wolfe"
        )

        def loss(A: Tensor = A, B: Tensor = B, search: torch.optim.Optimizer = search) -> Tensor:
            search.zero_grad()
            found = error(B @ A)
            found.backward()
            return found

        search.step(loss)
        errors.append(error(B @ A).item())
    return min(errors)
