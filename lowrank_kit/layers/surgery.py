"""Exchange linear layers of a model for low-rank ones."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_kit.errors import LowRankError
from lowrank_kit.layers.linear import LowRankLinear
from lowrank_kit.layers.pivoted import PivotedLinear

# Form of storage -> its layer.
LAYERS: dict[str, type[LowRankLinear] | type[PivotedLinear]] = {"factors": LowRankLinear, "pivoted": PivotedLinear}


def exchange_linear(model: nn.Module, name: str, rank: int, form: str = "factors") -> LowRankLinear | PivotedLinear:
    """Put an empty layer of low rank in the place of a Linear or Conv1D, with its bias, dtype and device.

    Args:
        model: changed in place.
        name: path of the layer in the model.
        rank: of the new layer.
        form: of storage, one of `LAYERS`.

    Raises:
        LowRankError: no such layer, not a linear one, or a pivoted one with as many rows as outputs.
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
    if form == "pivoted" and rank >= out_features:
        raise LowRankError(f"{name} has {out_features} outputs: a pivoted layer of rank {rank} has no others to make")
    new = LAYERS[form](
        in_features,
        out_features,
        rank,
        bias=old.bias is not None,
        dtype=old.weight.dtype,
        device=old.weight.device,
    )
    model.set_submodule(name, new)
    return new
