"""The reference: a model with its multipliers in the forward pass, by hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_kit.scaling.mup import MuP

Step = Callable[[], None]


def multiply(model: PreTrainedModel, multipliers: dict[str, float]) -> None:
    """From now on the outputs of all modules that have a parameter are multiplied by what it has."""

    def by(c: float) -> Any:
        return lambda module, args, output: c * output

    parameters = dict(model.named_parameters())
    by_id = {id(parameters[name]): c for name, c in multipliers.items()}
    for module in model.modules():
        # Of fused experts the last matrix is not a module; all that they give is multiplied with it.
        for c in {by_id[id(p)] for p in module.parameters(recurse=False) if id(p) in by_id}:
            module.register_forward_hook(by(c))


def unfolded(rule: MuP, folded: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with its multipliers in the forward pass in place of the weights."""
    model = type(folded)(folded.config).to(folded.dtype)
    model.load_state_dict(folded.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(rule.unfolded(name, parameter))
    multiply(model, rule.multipliers)
    return model


def largest_difference(rule: MuP, folded: nn.Module, explicit: nn.Module) -> float:
    """Over all weights, unfolded, relative to the largest of each."""
    others: dict[str, Tensor] = dict(explicit.named_parameters())
    found = 0.0
    for name, parameter in folded.named_parameters():
        other = others[name]
        apart = (rule.unfolded(name, parameter) - other).abs().max() / other.abs().max().clamp(min=1e-30)
        found = max(found, float(apart.item()))
    return found
