"""Pictures of losses over learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lowrank_kit.report.plots import TITLE_LETTER
from lowrank_kit.report.style import FAINT, INK, SEQUENTIAL, styled

# Losses are drawn up to so many nats above the least of a row: what lies higher says only that training failed.
_HEADROOM = 1.5
_DASHES = (0, (4, 3))


class UCurve(NamedTuple):
    """Losses of one size.

    Args:
        x: log2 of the learning rates.
        losses: [seeds, rates]; not finite where training diverged.
        best: where the marker goes, None for none.
        base: it is the size that rates are tuned on.
    """

    x: Sequence[float]
    losses: NDArray[np.float64]
    best: tuple[float, float] | None
    base: bool


RGBA = tuple[float, float, float, float]
Panel = tuple[str, Mapping[str, UCurve]]


def u_curves_plot(rows: Sequence[Sequence[Panel]], title: str) -> Figure:
    """Loss against log2 of the learning rate: the mean over seeds as a line, all seeds within a band, the best marked.

    Args:
        rows: of panels, each a title and its curves by name; a row shares its axes.
        title: heading of the picture.
    """
    columns = max(len(row) for row in rows)
    with styled():
        width = max(1.8 + 3.1 * columns, TITLE_LETTER * len(title))
        figure = Figure(figsize=(width, 1.0 + 2.9 * len(rows)))
        figure.suptitle(title, x=0.01, ha="left", parse_math=False)
        for row, part in zip(rows, figure.subfigures(len(rows), 1, squeeze=False)[:, 0], strict=True):
            panels = part.subplots(1, columns, sharey=True, squeeze=False)[0]
            for empty in panels[len(row) :]:
                empty.remove()
            for panel, (name, curves) in zip(panels, row, strict=False):
                _draw(panel, curves)
                panel.set_title(name, parse_math=False)
                panel.set_xlabel(r"$\log_2$ of the learning rate")
            _limit(panels[0], [curve for _, curves in row for curve in curves.values()])
            panels[0].set_ylabel("loss (nats)")
            part.legend(handles=_handles(row), loc="outside right upper")
    return figure


def _colours(names: Sequence[str]) -> list[RGBA]:
    palette = matplotlib.colormaps[SEQUENTIAL]  # without its light end
    return [palette(0.85 * i / max(1, len(names) - 1)) for i in range(len(names))]


def _draw(panel: Axes, curves: Mapping[str, UCurve]) -> None:
    for colour, curve in zip(_colours(list(curves)), curves.values(), strict=True):
        losses = np.where(np.isfinite(curve.losses), curve.losses, np.nan)  # which is not drawn
        low, middle, high = losses.min(axis=0), losses.mean(axis=0), losses.max(axis=0)
        panel.fill_between(curve.x, low, high, color=colour, alpha=0.18, linewidth=0)
        panel.plot(curve.x, middle, color=colour)
        if curve.best is None:
            continue
        if curve.base:
            panel.axvline(curve.best[0], color=FAINT, linewidth=1, linestyle=_DASHES, zorder=1)
        panel.plot(*curve.best, marker="o", color=colour, markeredgecolor="white", markersize=7.5, zorder=4)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _limit(panel: Axes, curves: Sequence[UCurve]) -> None:
    seeds = np.concatenate([curve.losses.ravel() for curve in curves])
    known = seeds[np.isfinite(seeds)]
    if known.size:
        span = min(_HEADROOM, float(np.ptp(known))) or 1.0
        panel.set_ylim(known.min() - 0.05 * span, known.min() + 1.05 * span)


def _handles(row: Sequence[Panel]) -> list[Line2D]:
    names = max((list(curves) for _, curves in row), key=len)
    lines = [Line2D([], [], color=colour, label=name) for colour, name in zip(_colours(names), names, strict=True)]
    best = Line2D([], [], color=INK, marker="o", linestyle="none", label="best")
    return [*lines, best, Line2D([], [], color=FAINT, linewidth=1, linestyle=_DASHES, label="best of the base")]
