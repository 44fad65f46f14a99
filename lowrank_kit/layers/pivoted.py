"""A linear layer of rank r in the pivoted form: r rows of its weight, and coefficients that make the others of them.

Shape legend: O out, I in, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank_kit.errors import LowRankError


def check_index(index: Tensor, num_out: int, name: str) -> None:
    """Refuse a pivot index that does not say for each output row once where it is.

    Args:
        index: [O], any integer dtype.
        num_out: O.
        name: of the matrix.

    Raises:
        LowRankError: a number out of range, or twice.
    """
    if index.shape == (num_out,) and torch.equal(index.sort().values.cpu().long(), torch.arange(num_out)):
        return
    outside = [int(number) for number in index.flatten() if not 0 <= number < num_out]
    told = f"{len(outside)} of them are not in 0 to {num_out - 1}, first {outside[0]}" if outside else "not each once"
    raise LowRankError(
        f"{name}.index: {index.numel()} numbers for {num_out} rows, {told}",
        hint="the file is damaged: copy or download it again, or compress the dense model again",
    )


class PivotedLinear(nn.Module):
    """y = cat(A x, C (A x))[index] + bias, with A [R, I] rows of the weight and C [O - R, R].

    Stored as `A.weight`, `C.weight`, `index`, `bias` and `weight`: a sentinel of one number that makes a loader without
    lowrank-kit stop at a shape mismatch instead of filling in random weights.

    Args:
        in_features: I.
        out_features: O, more than R.
        rank: R.
        bias: whether there is a bias, of shape [O].
    """

    weight: Tensor
    index: Tensor

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
        self.C = nn.Linear(rank, out_features - rank, bias=False, dtype=dtype, device=device)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.absorbs_index = False  # see `fuse`
        self.register_buffer("index", torch.arange(out_features, dtype=torch.int32, device=device))
        self.register_buffer("weight", torch.zeros(1, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """y for x [..., I]."""
        kept = self.A(x)
        # From as many tokens on as R, rows of [O, R] are fewer numbers to put in order than outputs.
        if self.absorbs_index and kept.numel() >= self.rank**2:
            y = nn.functional.linear(kept, self._ordered(self.C.weight.to(kept.dtype)))
        else:
            y = torch.cat((kept, self.C(kept)), dim=-1).index_select(-1, self.index)
        # Autocast leaves the bias as it is, and a sum would be of the wider dtype.
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _ordered(self, C: Tensor) -> Tensor:
        """B [O, R] with W = B A: rows of C and of the identity in the order of the outputs."""
        identity = torch.eye(self.rank, dtype=C.dtype, device=C.device)
        return torch.cat((identity, C)).index_select(0, self.index)

    def dense_weight(self) -> Tensor:
        """The weight, [O, I], in the dtype of its parts."""
        return torch.cat((self.A.weight, self.C.weight @ self.A.weight)).index_select(0, self.index)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
