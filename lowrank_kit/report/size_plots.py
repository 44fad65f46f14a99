"""Pictures of what goes with the size of a model, and what does not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lowrank_kit.report.style import FAINT, INK, MARKERS, colours, styled

# (Series, kind): a colour for each series, a dash for each kind.
Lines = Mapping[tuple[str, str], Sequence[tuple[float, float]]]
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))


def size_plot(
    panels: Sequence[Sequence[tuple[str, str, Lines]]], *, title: str, y_label: str, bound: float | None = None
) -> Figure:
    """Numbers against sizes, each relative to that of its least size, on logarithmic axes of base 2.

    Args:
        panels: rows of (heading, what x is, lines); points whose y is not a number above 0 are left out.
        title: heading of the picture.
        y_label: what y is, before "relative to the base".
        bound: largest slope allowed, drawn as a grey wedge.
    """
    every = [lines for row in panels for _, _, lines in row]
    series = tuple(dict.fromkeys(name for lines in every for name, _ in lines))
    kinds = tuple(dict.fromkeys(kind for lines in every for _, kind in lines))
    colour = colours(series)
    with styled():
        columns = max(len(row) for row in panels)
        figure = Figure(figsize=(1.2 + 2.6 * max(columns, 2), 1.5 + 2.4 * len(panels)))
        figure.suptitle(title, x=0.01, ha="left", parse_math=False)
        grid = figure.subplots(len(panels), columns, sharey=True, squeeze=False)
        for row, places in zip(panels, grid, strict=True):
            for (heading, x_label, lines), axes in zip(row, places, strict=True):
                _draw(axes, lines, colour, kinds, bound)
                axes.set_title(heading, parse_math=False)
                axes.set_xlabel(x_label)
        figure.supylabel(f"{y_label}, relative to the base", fontsize=10, color=INK)
        figure.legend(handles=_handles(colour, kinds, bound), loc="outside lower center", ncols=6 if columns > 2 else 4)
    return figure


def _draw(axes: Axes, lines: Lines, colour: Mapping[str, str], kinds: tuple[str, ...], bound: float | None) -> None:
    sizes = sorted({x for points in lines.values() for x, _ in points})
    if bound is not None and sizes:
        x = np.array(sizes) / sizes[0]
        axes.fill_between(sizes, x**-bound, x**bound, color=FAINT, alpha=0.25, linewidth=0)
    for (name, kind), points in lines.items():
        drawn = list(_relative(points))
        style = kinds.index(kind)
        axes.plot(
            [x for x, _ in drawn],
            [y for _, y in drawn],
            color=colour[name],
            linestyle=DASHES[style % len(DASHES)],
            marker=MARKERS[list(colour).index(name) % len(MARKERS)],
            markersize=4.5,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(2, subs=(1.0,) if high > 8 * low else (1.0, 1.5), numticks=8))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())


def _relative(points: Iterable[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    ordered = sorted(points)
    base = next((y for _, y in ordered), math.nan)
    return [(x, y / base) for x, y in ordered if base > 0 and 0 < y < math.inf]


def _handles(colour: Mapping[str, str], kinds: tuple[str, ...], bound: float | None) -> list[Line2D | Patch]:
    found: list[Line2D | Patch] = [
        Line2D([], [], color=colour[name], marker=marker, markersize=4.5, label=name)
        for name, marker in zip(colour, MARKERS * len(colour), strict=False)
    ]
    if len(kinds) > 1:
        found += [
            Line2D([], [], color=INK, linestyle=DASHES[i % len(DASHES)], label=kind) for i, kind in enumerate(kinds)
        ]
    if bound is not None:
        found.append(Patch(color=FAINT, alpha=0.25, linewidth=0, label=f"slope up to {bound:g}"))
    return found
