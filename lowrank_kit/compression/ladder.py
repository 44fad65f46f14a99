"""What can be bought for one matrix: its ranks in steps, what each costs, and at the top the dense matrix itself."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lowrank_kit.checkpoint.stacks import StoredStack
from lowrank_kit.checkpoint.writer import tensor_bytes
from lowrank_kit.compression.forms import FORMS, Form, form_of
from lowrank_kit.layers import STACKED

# Kernels of tensor cores take multiples of 16 (8 at least) without padding. A step of 1/64 of the smaller side moves
# the share kept by 3 % of the matrix at most, and steps of all matrices together fill a budget far more closely.
MAX_ALIGN = 16
STEPS_IN_SIDE = 64


@dataclass(frozen=True, eq=False)
class Ladder:
    """The steps of one matrix, or of one stack of them, cheapest first.

    Args:
        shape: (out, in).
        ranks: [L] int64 ascending; the last one, one above the cap, stands for the dense matrix.
        costs: [L] int64 ascending, numbers or bytes; the last one is that of the dense matrix.
    """

    shape: tuple[int, int]
    ranks: np.ndarray
    costs: np.ndarray

    def __len__(self) -> int:
        return len(self.ranks)

    def rank(self, step: int) -> int | None:
        """Rank at a step, None where the matrix is dense."""
        return None if step == len(self) - 1 else int(self.ranks[step])

    def numbers(self, form: str, dtype: str | None) -> list[int]:
        """Numbers at each step, whatever the costs count; `form` and `dtype` as of `ladder`."""
        ranks = self.ranks[:-1].tolist()
        counts = [FORMS[cheapest_form(self.shape, r, form, dtype)].numbers(self.shape, r) for r in ranks]
        return [*counts, math.prod(self.shape)]

    def above(self, step: int) -> Ladder:
        """The ladder from a step on."""
        return Ladder(self.shape, self.ranks[step:], self.costs[step:])


@lru_cache(maxsize=256)
def ladder(shape: tuple[int, int], form: str, dtype: str | None, align: int | None) -> Ladder:
    """The ladder of a matrix.

    Ranks are multiples of `align`, below the first of them powers of two. None is above the cap, the largest rank that
    costs less than the dense matrix: a matrix without such a rank has only the last step.

    Args:
        shape: (out, in).
        form: of storage, see `FORMS`; "auto" for the cheaper one at each rank.
        dtype: as safetensors says it, to count bytes; None to count numbers.
        align: what ranks are multiples of; None for `default_align`.
    """
    dense = shape[0] * shape[1] if dtype is None else tensor_bytes(dtype, shape)

    def cost(rank: int) -> int:
        return _cost(FORMS[cheapest_form(shape, rank, form, dtype)], shape, rank, dtype)

    return _rungs(shape, dense, cost, align)


def stack_ladder(stack: StoredStack, dtype: str | None, align: int | None) -> Ladder:
    """The ladder of all experts of a fused weight, which have one rank.

    Args:
        stack: the experts.
        dtype, align: as in `ladder`.
    """
    shape, form = stack.matrix.shape, form_of(stack, STACKED)
    dense = stack.count * (shape[0] * shape[1] if dtype is None else tensor_bytes(dtype, shape))
    return _rungs(shape, dense, lambda rank: _cost(form, shape, rank, dtype), align)


def _rungs(shape: tuple[int, int], dense: int, cost: Callable[[int], int], align: int | None) -> Ladder:
    cap = bisect_left(range(1, min(shape) + 1), dense, key=cost)
    align = align or default_align(shape)
    powers = [1 << i for i in range(align.bit_length()) if 1 << i < align]
    ranks = [rank for rank in (*powers, *range(align, cap + 1, align)) if rank <= cap]
    return Ladder(shape, np.array([*ranks, cap + 1]), np.array([*map(cost, ranks), dense]))


def cheapest_form(shape: tuple[int, int], rank: int, form: str, dtype: str | None) -> str:
    """The form itself, or for "auto" the one that takes less: two factors at the lowest ranks, which need no index."""
    if form != "auto":
        return form
    return min(FORMS, key=lambda one: _cost(FORMS[one], shape, rank, dtype))


def _cost(form: Form, shape: tuple[int, int], rank: int, dtype: str | None) -> int:
    return form.numbers(shape, rank) if dtype is None else form.nbytes(shape, rank, dtype)


def default_align(shape: tuple[int, int]) -> int:
    """The largest power of two up to a 64th of the smaller side, from 1 to 16."""
    share = max(1, min(shape) // STEPS_IN_SIDE)
    return int(min(MAX_ALIGN, 1 << (share.bit_length() - 1)))
