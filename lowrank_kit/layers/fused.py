"""Low-rank layers that read the same input read it once: their A stacked, one product for q, k, v and for gate, up.

Shape legend: I in, R rank, S sum of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowrank_kit.errors import LowRankError
from lowrank_kit.layers.linear import LowRankLinear
from lowrank_kit.layers.pivoted import PivotedLinear
from lowrank_kit.matrices import input_key, role_of

Model = TypeVar("Model", bound=nn.Module)


class StackedInputs(nn.Module):
    """The A [R, I] of several layers as one weight [S, I].

    Args:
        layers: that are called with the same tensor, one after the other; their A are taken.
    """

    def __init__(self, layers: list[LowRankLinear | PivotedLinear]) -> None:
        super().__init__()
        self.ranks = [layer.rank for layer in layers]
        self.weight = nn.Parameter(torch.cat([layer.A.weight for layer in layers]), requires_grad=False)
        self._read: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def rows(self, place: int) -> Tensor:
        """A of one layer, [R, I]."""
        return self.weight.split(self.ranks)[place]

    def forward(self, x: Tensor, place: int) -> Tensor:
        """A x of one layer, [..., R], for x [..., I]: the first computes it for all, the last lets go of it.

        A layer that is called with another tensor than the first gets its own product.
        """
        if place == 0:
            self._read, self._parts = x, nn.functional.linear(x, self.weight).split(self.ranks, dim=-1)
        elif self._read is not x:
            return nn.functional.linear(x, self.rows(place))
        part = self._parts[place]
        if place == len(self.ranks) - 1:
            self._read, self._parts = None, ()
        return part

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise LowRankError(
            "a fused model is for inference, its weights are not those of the checkpoint format",
            hint="save the model before lowrank_kit.fuse, or load it again",
        )


class StackedPart(nn.Module):
    """Stands for A of one layer.

    Args:
        stack: that holds it.
        place: which of its layers.
    """

    def __init__(self, stack: StackedInputs, place: int) -> None:
        super().__init__()
        self.stack, self.place = stack, place

    @property
    def weight(self) -> Tensor:
        """A, [R, I]."""
        return self.stack.rows(self.place)

    def forward(self, x: Tensor) -> Tensor:
        """A x, [..., R], for x [..., I]."""
        return self.stack(x, self.place)


def fuse(model: Model) -> Model:
    """Stack the A of low-rank layers that read the same input; the outputs stay the same, up to rounding.

    Pivoted layers take two factors for many tokens, with the order of the outputs in the second: r^2 numbers more to
    multiply with and none to move. For inference: the model cannot be trained or saved afterwards.

    Args:
        model: with low-rank layers, on the device and of the dtype that it runs in; changed in place.
    """
    groups: dict[str, list[LowRankLinear | PivotedLinear]] = defaultdict(list)
    modules = dict(model.named_modules())
    for path, layer in modules.items():
        if isinstance(layer, LowRankLinear | PivotedLinear) and _is_plain(layer.A):
            owner, _, leaf = path.rpartition(".")
            siblings = tuple(name for name, _ in modules[owner].named_children())
            groups[input_key(owner, role_of(leaf, siblings), path, siblings)].append(layer)
        if isinstance(layer, PivotedLinear) and _is_plain(layer.C):
            layer.absorbs_index = True
    for layers in groups.values():
        if len(layers) > 1 and len({(layer.A.weight.dtype, layer.A.weight.device) for layer in layers}) == 1:
            stack = StackedInputs(layers)
            for place, layer in enumerate(layers):
                layer.A = StackedPart(stack, place)  # type: ignore[assignment]
    return model


def _is_plain(layer: nn.Module) -> bool:
    """Whether nothing is wrapped around it, such as an adapter, a hook of offloading or int8 weights."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and not hasattr(layer, "_hf_hook")
        and (layer.weight.device.type != "meta")
    )
