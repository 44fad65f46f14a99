"""The std that a model's own initialization draws each parameter with, read from what it does on the meta device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel


def initial_stds(model: PreTrainedModel) -> dict[str, float]:
    """Parameter name -> std of its initialization, 0 where it is constant; those drawn in no known way are left out.

    Args:
        model: on the meta device, where nothing is drawn, but what would be is seen.
    """
    with _Draws() as draws:
        # Children first, as transformers does it: GPT-2's blocks draw the ends of their branches once more.
        model.apply(model._init_weights)
    return {name: draws.stds[id(p)] for name, p in model.named_parameters() if id(p) in draws.stds}


class _Draws(TorchDispatchMode):
    """Keeps the std of what was drawn into each tensor last."""

    def __init__(self) -> None:
        super().__init__()
        self.stds: dict[int, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, tensor = func.__name__.partition(".")[0], args[0] if args else None
        if isinstance(tensor, torch.Tensor):
            known = self.stds.get(id(tensor), 0.0)
            given = [*args[1:], *kwargs.values()]
            if name == "normal_":
                self.stds[id(tensor)] = float(given[1])
            elif name == "uniform_":
                self.stds[id(tensor)] = (given[1] - given[0]) / math.sqrt(12)
            elif name in ("zero_", "fill_"):
                self.stds[id(tensor)] = 0.0
            elif name == "erfinv_":  # of what is uniform in (-1, 1): a truncated normal
                self.stds[id(tensor)] = math.sqrt(0.5)
            elif name == "mul_":
                self.stds[id(tensor)] = known * abs(given[0])
        return func(*args, **kwargs)
