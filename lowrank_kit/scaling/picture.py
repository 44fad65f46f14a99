"""The picture of a sweep."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from lowrank_kit.report.curves import UCurve, u_curves_plot
from lowrank_kit.scaling.family import Size
from lowrank_kit.scaling.transfer import Sweep
from lowrank_kit.scaling.write import LABELS

_TITLES = {"mup": LABELS["k2"], "k1": LABELS["k1"], "sp": "plain"}


def draw(sweep: Sweep, title: str = "Loss against the learning rate of the base") -> Figure:
    """U curves: a row of panels for width and depth, one for each rule, a line for each size.

    Args:
        sweep: with losses of all seeds for the sizes that are drawn.
        title: heading.
    """
    panels = {
        (f"{axis}, {_TITLES[rule]}", axis): {
            _label(axis, size, sweep.grid.base): curve
            for size in sorted({sweep.grid.base, *sweep.grid.axis(axis)})
            if (curve := _curve(sweep, size, rule)) is not None
        }
        for axis in sweep.grid.axes
        for rule in sweep.grid.rules_of(axis)
    }
    rows = [[(name, curves) for (name, of), curves in panels.items() if of == axis] for axis in sweep.grid.axes]
    return u_curves_plot(rows, title)


def _label(axis: str, size: Size, base: Size) -> str:
    number = size.width if axis == "width" else size.depth
    return f"{axis} {number}{', base' if size == base else ''}"


def _curve(sweep: Sweep, size: Size, rule: str) -> UCurve | None:
    mean = sweep.losses(size, rule)
    if mean is None:
        return None
    seeds = np.array([sweep.losses(size, rule, seed) for seed in sweep.grid.seeds_of(rule)], dtype=float)
    found = sweep.transfer(size, rule)
    best = None if found is None else found.optimum
    mark = None if best is None or not math.isfinite(best.loss) else (best.log2_rate, best.loss)
    return UCurve(sweep.grid.log2_rates, seeds, mark, size == sweep.grid.base)
