"""A budget becomes one step of its ladder for every matrix, and is never exceeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lowrank_kit.compression.allocation import Allocation, Evidence, uniform_levels
from lowrank_kit.compression.ladder import Ladder


@dataclass(frozen=True, eq=False)
class _Offers:
    """Steps up that are for sale, by matrix and then from low to high; each [N]."""

    matrix: np.ndarray
    last: np.ndarray
    cost: np.ndarray
    level: np.ndarray
    share: np.ndarray


def allocate(ladders: Sequence[Ladder], evidence: Sequence[Evidence], allocation: Allocation, budget: int) -> list[int]:
    """Spend a budget on matrices.

    Every matrix starts at its floor, then steps are bought by level. What does not fit is passed over and the next
    bought, until no matrix has a next step that fits.

    Args:
        ladders: what each matrix can be, in the unit of the budget.
        evidence: of each matrix.
        allocation: says the order.
        budget: for all of them, at least what the first steps cost.

    Returns:
        Step of each ladder; its costs sum to the budget or less.

    Raises:
        ValueError: the first steps cost more than the budget, or evidence is missing.
    """
    bottom = [0] * len(ladders)
    if not ladders:
        return bottom
    if budget < _total(ladders, bottom):
        raise ValueError(f"a budget of {budget} is less than the {_total(ladders, bottom)} of the first steps")
    even = _spend(ladders, bottom, [uniform_levels(one, Evidence()) for one in ladders], budget)
    if allocation.levels is uniform_levels:
        return even
    floors = [floor_step(one, step) for one, step in zip(ladders, even, strict=True)]
    # Above the floor alone: a hull that starts lower may not touch it.
    above = [one.above(floor) for one, floor in zip(ladders, floors, strict=True)]
    levels = [allocation.levels(one, known) for one, known in zip(above, evidence, strict=True)]
    return _spend(ladders, floors, levels, budget)


def floor_step(ladder: Ladder, uniform: int) -> int:
    """The lowest step of at least half the rank that the uniform allocation buys.

    Allocations by error alone starve some matrices; half of uniform is where that stops (Swift-SVD, arXiv 2604.01609,
    table 6).
    """
    return int(np.searchsorted(2 * ladder.ranks, ladder.ranks[uniform]))


def _total(ladders: Sequence[Ladder], steps: Sequence[int]) -> int:
    return sum(int(one.costs[step]) for one, step in zip(ladders, steps, strict=True))


def _spend(ladders: Sequence[Ladder], start: Sequence[int], levels: Sequence[np.ndarray], budget: int) -> list[int]:
    """Buy from `start` on; `levels[i]` are of the steps of ladder i above its start."""
    left = budget - _total(ladders, start)
    # Steps of one level are worth it together, as the jump to a dense matrix: first all or none of them.
    steps, left = _buy(_offers(ladders, start, start, levels, whole=True), start, left)
    steps, _ = _buy(_offers(ladders, start, steps, levels, whole=False), steps, left)
    return steps


def _buy(offers: _Offers, steps: Sequence[int], left: int) -> tuple[list[int], int]:
    """Go through the offers by level, passing over a matrix as soon as its next offer does not fit."""
    bought = list(steps)
    passed = [False] * len(bought)
    # Equal levels by share of the matrix: what is worth nothing is spread evenly.
    order = np.lexsort((offers.matrix, offers.share, offers.level))
    for matrix, last, cost in zip(
        offers.matrix[order].tolist(), offers.last[order].tolist(), offers.cost[order].tolist(), strict=True
    ):
        if passed[matrix]:
            continue
        if cost <= left:
            bought[matrix], left = last, left - cost
        else:
            passed[matrix] = True
    return bought, left


def _offers(
    ladders: Sequence[Ladder], start: Sequence[int], steps: Sequence[int], levels: Sequence[np.ndarray], *, whole: bool
) -> _Offers:
    """The steps above `steps`: with `whole`, those of a matrix with the same finite level as one offer."""
    columns: list[tuple[np.ndarray, ...]] = []
    for index, one in enumerate(ladders):
        here = levels[index][steps[index] - start[index] :]
        ends = np.arange(len(here))
        if whole:
            ends = ends[np.isfinite(here) & np.append(here[1:] != here[:-1], True)[: len(here)]]
        costs = one.costs[steps[index] :]
        marks = costs[np.concatenate([[0], ends + 1]).astype(np.int64)]
        share = (marks[:-1] + marks[1:]) / (2 * one.costs[-1])
        columns.append((np.full(len(ends), index), steps[index] + ends + 1, np.diff(marks), here[ends], share))
    return _Offers(*map(np.concatenate, zip(*columns, strict=True)))
