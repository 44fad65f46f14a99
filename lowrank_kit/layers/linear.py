"""A linear layer of rank r: two thin matrices instead of one.

Shape legend: O out, I in, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """y = B (A x) + bias, with A [R, I] and B [O, R].

    Stored as `A.weight`, `B.weight`, `B.bias` and `weight`: a sentinel of one number that makes a loader without
    lowrank-kit stop at a shape mismatch instead of filling in random weights.

    Args:
        in_features: I.
        out_features: O.
        rank: R.
        bias: whether there is a bias, of shape [O].
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.A = nn.Linear(in_features, rank, bias=False, dtype=dtype, device=device)
        self.B = nn.Linear(rank, out_features, bias=bias, dtype=dtype, device=device)
        self.register_buffer("weight", torch.zeros(1, dtype=dtype, device=device))

    @property
    def bias(self) -> Tensor | None:
        """That of B, where models look for it that set the biases of their layers."""
        return self.B.bias

    def forward(self, x: Tensor) -> Tensor:
        """y for x [..., I]."""
        return self.B(self.A(x))

    def dense_weight(self) -> Tensor:
        """B A, [O, I], in the dtype of the factors."""
        return self.B.weight @ self.A.weight

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
