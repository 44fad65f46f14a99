"""Where the loss is least over learning rates, and what a rate found elsewhere costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# The most that an optimum may be off in log2, and the most nats that a rate from the base may cost.
MOST_SHIFT, MOST_REGRET = 0.75, 0.02
# A neighbour so many nats above the best point is off a cliff, as one that diverged: no parabola goes through it.
CLIFF = 0.5


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of one size.

    Args:
        log2_rate: log2 of it.
        loss: at it.
        how: "parabola" through the best point of the grid and its neighbours; "grid", the best point itself, where
            training diverged, or all but did, at a neighbour; "edge", the best point at an end of the grid: the optimum
            is not found.
        points: the three of the parabola, log2 rate and loss; only the best one where there is none.
    """

    log2_rate: float
    loss: float
    how: str
    points: tuple[tuple[float, float], ...]

    @property
    def found(self) -> bool:
        return self.how != "edge"


def find_optimum(log2_rates: Sequence[float], losses: Sequence[float]) -> Optimum | None:
    """The least of a curve of losses; None where training diverged at every rate.

    Args:
        log2_rates: ascending.
        losses: at these; not finite where training diverged.
    """
    known = [loss if math.isfinite(loss) else math.inf for loss in losses]
    best = min(range(len(known)), key=known.__getitem__)
    if known[best] == math.inf:
        return None
    point = (log2_rates[best], known[best])
    if best in (0, len(known) - 1):
        return Optimum(*point, "edge", (point,))
    points = tuple((log2_rates[i], known[i]) for i in (best - 1, best, best + 1))
    if max(loss for _, loss in points) > known[best] + CLIFF:
        return Optimum(*point, "grid", (point,))
    a, b, c = _parabola(points)
    if a <= 0:  # all three alike
        return Optimum(*point, "grid", (point,))
    centre = -b / (2 * a)
    return Optimum(point[0] + centre, c + b * centre / 2, "parabola", points)


def loss_at(
    log2_rate: float, optimum: Optimum, log2_rates: Sequence[float], losses: Sequence[float]
) -> tuple[float, str]:
    """The loss of a curve at any rate, and where it is read: off the "parabola" of its optimum, or at the nearest point
    of the "grid"; not finite where training diverged there."""
    if len(optimum.points) == 3 and optimum.points[0][0] <= log2_rate <= optimum.points[2][0]:
        a, b, c = _parabola(optimum.points)
        x = log2_rate - optimum.points[1][0]
        return a * x * x + b * x + c, "parabola"
    nearest = min(range(len(log2_rates)), key=lambda i: abs(log2_rates[i] - log2_rate))
    return losses[nearest], "grid"


def _parabola(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """a, b, c of a x^2 + b x + c through three points, x counted from the middle one."""
    x = np.array([x - points[1][0] for x, _ in points])
    a, b, c = np.linalg.solve(np.vander(x, 3), np.array([y for _, y in points]))
    return float(a), float(b), float(c)


@dataclass(frozen=True)
class Transfer:
    """What the base's learning rate is to a size.

    Args:
        optimum: of the size; None where training diverged at every rate.
        shift: |log2 of its best rate - log2 of the base's|; NaN where one of them was not found.
        regret: its loss at the base's best rate - its least loss, in nats; inf where training diverged there.
        read: how the loss at the base's rate was read, see `loss_at`.
    """

    optimum: Optimum | None
    shift: float
    regret: float
    read: str

    @property
    def passed(self) -> bool:
        return self.shift <= MOST_SHIFT and self.regret <= MOST_REGRET


def transfer(log2_rates: Sequence[float], losses: Sequence[float], base: Sequence[float]) -> Transfer:
    """Compare the curve of a size with that of the base.

    Args:
        log2_rates: ascending.
        losses: of the size at these; not finite where training diverged.
        base: of the base.
    """
    here, there = find_optimum(log2_rates, losses), find_optimum(log2_rates, base)
    if here is None or there is None:
        return Transfer(here, math.nan, math.inf, "grid")
    loss, read = loss_at(there.log2_rate, here, log2_rates, losses)
    shift = abs(here.log2_rate - there.log2_rate) if here.found and there.found else math.nan
    return Transfer(here, shift, loss - here.loss if math.isfinite(loss) else math.inf, read)
