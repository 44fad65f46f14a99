"""The look of all pictures, in one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

# Okabe and Ito, "Color Universal Design", 2008: eight colours that stay apart in the common forms of colour blindness.
# Yellow is left out, it is too light for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# Perceptually uniform and readable in grey: one hue order for depth and for shares, a diverging one for differences.
SEQUENTIAL = "viridis"
DIVERGING = "PuOr_r"

INK = "#262626"
FAINT = "#8C8C8C"
GRID = "#E3E3E3"
EMPTY_CELL = "#EFEFEF"

STYLE: dict[Any, object] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "text.color": INK,
    "figure.facecolor": "white",
    "figure.titlesize": 12.5,
    "figure.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.labelsize": 10.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 6.0,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "savefig.facecolor": "white",
    # The same file from the same numbers on every machine.
    "svg.hashsalt": "lowrank-kit",
}


@contextmanager
def styled() -> Iterator[None]:
    """Apply the style while a figure is made; matplotlib's settings are as before afterwards."""
    with matplotlib.rc_context(STYLE):
        yield


def colours(names: list[str] | tuple[str, ...]) -> dict[str, str]:
    """A colour for each series, in order; the palette repeats after seven."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
