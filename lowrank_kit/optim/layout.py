"""Parameters as the matrices they hold: parts of fused ones, transposed ones the right way round, experts as a batch.

Shape legend: the last two dimensions of a parameter are [out, in], or [in, out] when it is stored transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How the matrices of a parameter lie in it.

    Args:
        transposed: stored as [in, out].
        split: rows of the parts in each of `groups` equal runs of output rows; empty where it is one matrix. A fused
            [q; k; v] is one run of three parts, one that is interleaved by head has a run for each head.
        groups: how many runs.
    """

    transposed: bool = False
    split: tuple[int, ...] = ()
    groups: int = 1

    def parts(self, X: Tensor) -> list[Tensor]:
        """The matrices of a parameter, or of its momentum, each [..., out, in]; views where the memory allows it."""
        X = X.mT if self.transposed else X
        if not self.split:
            return [X]
        runs = X.unflatten(-2, (self.groups, sum(self.split)))
        return [part.flatten(-3, -2) for part in runs.split(self.split, dim=-2)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The parameter that `parts` takes apart."""
        X = parts[0]
        if self.split:
            X = torch.cat([part.unflatten(-2, (self.groups, -1)) for part in parts], dim=-2).flatten(-3, -2)
        return X.mT if self.transposed else X
