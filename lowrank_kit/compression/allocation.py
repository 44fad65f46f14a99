"""In which order ranks are bought. A new allocation is a function and a line in the table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowrank_kit.compression.ladder import Ladder
from lowrank_kit.linalg.spectrum import effective_rank


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of one matrix; None is not known. S = min(out, in).

    Args:
        singular_values: [S] of W.
        weighted_values: [S] singular values of W H^(1/2), H the Gram of the inputs.
        loss_scores: [S] nats per token lost when a direction goes, at least 0; rank r keeps the first r.
    """

    singular_values: Tensor | None = None
    weighted_values: Tensor | None = None
    loss_scores: Tensor | None = None


@dataclass(frozen=True)
class Allocation:
    """An allocation.

    Args:
        title: what it does.
        needs: what of the evidence it asks for: "nothing", "weights", "inputs" or "loss".
        levels: (ladder of L steps, evidence) -> [L - 1] float64 ascending, the level at which each step up is
            bought: of all matrices, the step of the lowest level first. Infinite where a step is worth nothing.
        source: where it comes from.
    """

    title: str
    needs: str
    levels: Callable[[Ladder, Evidence], np.ndarray]
    source: str


def uniform_levels(ladder: Ladder, evidence: Evidence) -> np.ndarray:
    """Share of the dense matrix kept."""
    return _middles(ladder.costs) / float(ladder.costs[-1])


def _erank_levels(ladder: Ladder, evidence: Evidence) -> np.ndarray:
    return _over(_middles(ladder.ranks), _effective_rank(evidence.singular_values))


def _lagrange_levels(ladder: Ladder, evidence: Evidence) -> np.ndarray:
    # Minimizes sum R / r over the matrices, R the effective rank, at sum r (m + n) = budget: r = t sqrt(R / (m + n)).
    return _over(_middles(ladder.ranks), math.sqrt(_effective_rank(evidence.weighted_values) / sum(ladder.shape)))


def _loss_levels(ladder: Ladder, evidence: Evidence) -> np.ndarray:
    """Cost of a nat saved, along the lower convex hull of (cost, loss).

    The hull ends at the dense matrix, which loses nothing: near the cap factors cost as much as it does, so it jumps
    from some rank to the end.
    """
    scores = _finite(evidence.loss_scores).clamp(min=0)
    lost = torch.cat([scores.flip(0).cumsum(0).flip(0), scores.new_zeros(1)]).numpy()
    losses = np.append(lost[ladder.ranks[:-1]], 0.0)
    corners = _lower_hull(ladder.costs.astype(np.float64), losses)
    with np.errstate(divide="ignore", over="ignore"):
        levels = np.diff(ladder.costs[corners]) / -np.diff(losses[corners])
    # What saves nothing is bought last, and rounding must not put a later step first.
    levels = np.maximum.accumulate(np.where(levels > 0, levels, np.inf))
    return np.repeat(levels, np.diff(corners))


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation("the same keep for every matrix", "nothing", uniform_levels, "SVD-LLM, arXiv 2403.07378"),
    "erank": Allocation(
        "ranks in proportion to the effective rank of W", "weights", _erank_levels, "arXiv 2610.11730, appendix B.1"
    ),
    "lagrange": Allocation(
        "ranks as the root of the effective rank over cost, of W weighted by its inputs",
        "inputs",
        _lagrange_levels,
        "D-Rank, arXiv 2509.25622",
    ),
    "loss": Allocation(
        "the directions whose loss costs most, by the gradient of the loss",
        "loss",
        _loss_levels,
        "after ZS-SVD, arXiv 2602.02848, and IO-SVD, arXiv 2605.15626",
    ),
}


def _middles(values: np.ndarray) -> np.ndarray:
    """Half-way up each step, so that what is bought is the nearest rank and not the next one down."""
    return np.asarray((values[:-1] + values[1:]) / 2)


def _over(values: np.ndarray, scale: float) -> np.ndarray:
    """values / scale, infinite for a scale of zero."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(values, np.float64) / np.float64(scale)


def _effective_rank(values: Tensor | None) -> float:
    return effective_rank(_finite(values))


def _finite(values: Tensor | None) -> Tensor:
    """In float64, with NaN as 0 and infinity as a number whose sums do not overflow."""
    if values is None:
        raise ValueError("the allocation asks for evidence that is not there")
    most = torch.finfo(torch.float64).max / (values.numel() + 1)
    return values.double().cpu().nan_to_num(nan=0.0).clamp(-most, most)


def _lower_hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Indices of the corners of the lower convex hull of points with ascending x."""
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2:]
            # Slopes and not a cross product, which may overflow.
            if (y[b] - y[a]) / (x[b] - x[a]) < (y[i] - y[b]) / (x[i] - x[b]):
                break
            corners.pop()
        corners.append(i)
    return corners
