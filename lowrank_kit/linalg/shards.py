"""A matrix whose rows are spread over processes: what the maths asks of the others, given in from above."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Shards:
    """How the rows of a matrix are spread: each process holds a run of them, some perhaps none.

    Every process has to call the same functions in the same order, and gets the same bits back.

    Args:
        sum: of a tensor over the processes; it and `max` may write into the tensor.
        max: elementwise, over the processes.
        stack: tensors [..., a, b] of the processes, one below the other: [..., W a, b].
        index: place of this process among the W.
    """

    sum: Callable[[Tensor], Tensor] = _same
    max: Callable[[Tensor], Tensor] = _same
    stack: Callable[[Tensor], Tensor] = _same
    index: int = 0


WHOLE = Shards()
