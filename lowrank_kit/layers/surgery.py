"""Exchange linear layers and experts of a model for low-rank ones."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_kit.errors import LowRankError
from lowrank_kit.layers.experts import PROJECTIONS, LowRankExperts, LowRankStack, why_dense
from lowrank_kit.layers.int8 import Int8Linear
from lowrank_kit.layers.linear import LowRankLinear
from lowrank_kit.layers.pivoted import PivotedLinear

# Form of storage -> its layer.
LAYERS: dict[str, type[LowRankLinear] | type[PivotedLinear]] = {"factors": LowRankLinear, "pivoted": PivotedLinear}
# What the forms of layers whose factors are 8-bit codes end with.
INT8 = "-int8"
_OTHER = "the names and ranks in quantization_config of config.json seem to be those of another model"
# The form of a fused 3-D tensor of experts.
STACKED = "stacked"


def exchange(
    model: nn.Module, name: str, rank: int, form: str = "factors"
) -> LowRankLinear | PivotedLinear | LowRankStack:
    """`exchange_linear`, or `exchange_experts` for the form of experts."""
    return exchange_experts(model, name, rank) if form == STACKED else exchange_linear(model, name, rank, form)


def exchange_linear(model: nn.Module, name: str, rank: int, form: str = "factors") -> LowRankLinear | PivotedLinear:
    """Put an empty layer of low rank in the place of a Linear or Conv1D, with its bias, dtype and device.

    Args:
        model: changed in place.
        name: path of the layer in the model.
        rank: of the new layer.
        form: of storage, one of `LAYERS`, or one with `INT8` behind it.

    Raises:
        LowRankError: no such layer, not a linear one, or a pivoted one with as many rows as outputs.
    """
    old = _submodule(model, name, name)
    if isinstance(old, Conv1D):
        in_features, out_features = old.weight.shape
    elif isinstance(old, nn.Linear):
        out_features, in_features = old.weight.shape
    else:
        raise LowRankError(f"{name} is a {type(old).__name__}, not a linear layer", hint=_OTHER)
    layer = LAYERS[form.removesuffix(INT8)]
    if layer is PivotedLinear and rank >= out_features:
        raise LowRankError(f"{name} has {out_features} outputs: a pivoted layer of rank {rank} has no others to make")
    if rank > min(in_features, out_features):
        sides = f"{out_features} x {in_features}"
        raise LowRankError(f"{name} is {sides}: its rank is at most the smaller of these, not {rank:,}", hint=_OTHER)
    new = layer(
        in_features,
        out_features,
        rank,
        bias=old.bias is not None,
        dtype=old.weight.dtype,
        device=old.weight.device,
    )
    if form.endswith(INT8):
        for leaf, factor in list(new.named_children()):
            new.add_module(leaf, _int8(factor))
    model.set_submodule(name, new)
    return new


def _int8(factor: nn.Module) -> Int8Linear:
    assert isinstance(factor, nn.Linear)
    return Int8Linear(
        factor.in_features,
        factor.out_features,
        bias=factor.bias is not None,
        dtype=factor.weight.dtype,
        device=factor.weight.device,
    )


def exchange_experts(model: nn.Module, name: str, rank: int) -> LowRankStack:
    """Put empty stacked factors in the place of a fused weight of experts, with its dtype and device.

    Args:
        model: changed in place: the experts become `LowRankExperts` with the first of their weights.
        name: path of the weight in the model.
        rank: of the factors, one for all experts.

    Raises:
        LowRankError: no such weight, or experts that cannot be factorized.
    """
    path, _, projection = name.rpartition(".")
    experts = _submodule(model, path, name)
    if projection not in PROJECTIONS or projection not in dict(experts.named_parameters(recurse=False)):
        raise LowRankError(f"{name} is no fused weight of experts that is dense")
    if not isinstance(experts, LowRankExperts):
        if reason := why_dense(experts):
            raise LowRankError(f"{name} stays dense: {reason}")
        experts = LowRankExperts(experts)
        model.set_submodule(path, experts)
    return experts.factorize(projection, rank)


def _submodule(model: nn.Module, path: str, name: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise LowRankError(f"{type(model).__name__} has no module {name}") from None
