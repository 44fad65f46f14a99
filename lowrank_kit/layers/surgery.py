"""Exchange linear layers of a model for low-rank ones."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_kit.errors import LowRankError
from lowrank_kit.layers.linear import LowRankLinear


def exchange_linear(model: nn.Module, name: str, rank: int) -> LowRankLinear:
    """Put an empty LowRankLinear in the place of a Linear or Conv1D, with its bias, dtype and device.

    Args:
        model: changed in place.
        name: path of the layer in the model.
        rank: of the new layer.

    Raises:
        LowRankError: no such layer, or not a linear one.
    """
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise LowRankError(f"{type(model).__name__} has no module {name}") from None
    if isinstance(old, Conv1D):
        in_features, out_features = old.weight.shape
    elif isinstance(old, nn.Linear):
        out_features, in_features = old.weight.shape
    else:
        raise LowRankError(f"{name} is a {type(old).__name__}, not a linear layer")
    new = LowRankLinear(
        in_features,
        out_features,
        rank,
        bias=old.bias is not None,
        dtype=old.weight.dtype,
        device=old.weight.device,
    )
    model.set_submodule(name, new)
    return new
