"""A linear layer whose weight is stored as 8-bit codes: a factor in half of bfloat16's bytes.

Shape legend: I in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LARGEST_CODE = 127


class Int8Linear(nn.Module):
    """y = W x + bias with W = codes * scale, made anew at each call: it saves memory, not time.

    Stored as `codes`, `scale` and `bias`.

    Args:
        in_features: I.
        out_features: O.
        bias: whether there is a bias, of shape [O].
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(out_features, 1, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @property
    def weight(self) -> Tensor:
        """W, [O, I], in the dtype of the scale."""
        return self.codes.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """y for x [..., I]."""
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def to_codes(W_OI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [O, I] int8 and scale [O, 1] of a weight: the largest number of each row is 127 of its scale.

    Args:
        W_OI: [O, I], any float dtype, finite.
        dtype: of the scale, which is rounded before the codes are made of it.
    """
    W_OI = W_OI.to(torch.promote_types(W_OI.dtype, torch.float32))
    scale_O1 = (W_OI.abs().amax(1, keepdim=True) / LARGEST_CODE).to(dtype)
    scale_O1 = torch.where(scale_O1 > 0, scale_O1, torch.ones_like(scale_O1))
    codes_OI = (W_OI / scale_O1.to(W_OI.dtype)).round().clamp(-LARGEST_CODE, LARGEST_CODE)
    return codes_OI.to(torch.int8), scale_O1
