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
    """From now on the outputs of modules are multiplied by those of their parameters."""

    def by(c: float) -> Any:
        return lambda module, args, output: c * output

    modules = {name.rpartition(".")[0]: c for name, c in multipliers.items()}
    for path, c in modules.items():
        module = model.get_submodule(path)
        # Of fused experts the last matrix is not a module; all that they give is multiplied with it.
        module.register_forward_hook(by(c))


def unfolded(rule: MuP, folded: PreTrainedModel, offsets: frozenset[str] = frozenset()) -> PreTrainedModel:
    """A copy of a model with its multipliers in the forward pass in place of the weights."""
    model = type(folded)(folded.config).to(folded.dtype)
    model.load_state_dict(folded.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.div_(rule.fold(name))
    multiply(model, rule.multipliers)
    return model


def largest_difference(rule: MuP, folded: nn.Module, explicit: nn.Module) -> float:
    """Over all weights, of what is folded back, relative to the largest of each."""
    others: dict[str, Tensor] = dict(explicit.named_parameters())
    found = 0.0
    for name, parameter in folded.named_parameters():
        other = rule.fold(name) * others[name]
        found = max(found, float(((parameter - other).abs().max() / other.abs().max().clamp(min=1e-30)).item()))
    return found
