"""Pictures of lines over steps or over depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lowrank_kit.report.plots import TITLE_LETTER
from lowrank_kit.report.style import MARKERS, colours, styled

# Lines with more points than this have no markers.
_MARKED = 24
_NAME_LETTER = 0.085  # inches of a letter in a legend


class LinePanel(NamedTuple):
    """One pair of axes.

    Args:
        heading: above it.
        x_label, y_label: what is drawn, with units.
        lines: name -> points; a y that is not finite is left out. Lines of one name have one colour in all panels.
    """

    heading: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def lines_plot(panels: Sequence[LinePanel], *, title: str, columns: int = 3) -> Figure:
    """Panels of lines with one legend, at most `columns` in a row."""
    names = tuple(dict.fromkeys(name for panel in panels for name in panel.lines))
    colour = colours(names)
    columns = max(1, min(columns, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))
    legend = 0.6 + _NAME_LETTER * max(map(len, names), default=0)
    with styled():
        width = max(1.0 + 3.4 * columns + legend, TITLE_LETTER * len(title))
        figure = Figure(figsize=(width, 0.7 + 2.7 * rows))
        figure.suptitle(title, x=0.01, ha="left", parse_math=False)
        places = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
        for axes, panel in zip(places, panels, strict=False):
            _draw(axes, panel, colour, names)
        for empty in places[len(panels) :]:
            empty.remove()
        handles = [
            Line2D([], [], color=colour[name], marker=MARKERS[i % len(MARKERS)], markersize=4.5, label=name)
            for i, name in enumerate(names)
        ]
        for text in figure.legend(handles=handles, loc="outside right upper").get_texts():
            text.set_parse_math(False)
    return figure


def _draw(axes: Axes, panel: LinePanel, colour: Mapping[str, str], names: Sequence[str]) -> None:
    for name, points in panel.lines.items():
        shown = [(x, y) for x, y in points if math.isfinite(y)]
        marker = MARKERS[names.index(name) % len(MARKERS)] if len(shown) <= _MARKED else None
        axes.plot(*zip(*shown, strict=True), color=colour[name], marker=marker, markersize=4.5) if shown else None
    axes.set_title(panel.heading, parse_math=False)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
