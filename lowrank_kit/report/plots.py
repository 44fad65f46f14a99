"""Pictures of numbers. Each function takes plain data and returns a figure; `files.write_png` writes it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from lowrank_kit.report.style import DIVERGING, EMPTY_CELL, FAINT, INK, MARKERS, SEQUENTIAL, colours, styled

# Values below this share of the largest are rounding noise of a float64 decomposition of bf16 or fp32 weights.
DECAY_FLOOR = 1e-7

# Inches that a letter of a title takes at most on average: a picture is as wide as its title.
TITLE_LETTER = 0.12

DECAY_X = r"$i\,/\,\min(m, n)$"
DECAY_Y = r"$\sigma_i\,/\,\sigma_1$"

Curve = tuple[int | None, ArrayLike]


def decay_plot(curves: Mapping[str, Sequence[Curve]], title: str = "Decay of the singular values") -> Figure:
    """sigma_i / sigma_1 (log) against i / min(m, n): one panel for each role, one line for each matrix.

    Args:
        curves: role -> (block, singular values descending); the colour is the block, grey where it is None.
        title: heading of the picture.
    """
    blocks = [block for lines in curves.values() for block, _ in lines if block is not None]
    depth = Normalize(min(blocks, default=0), max(blocks, default=0) or 1)
    with styled():
        figure, panels = _panels(list(curves), title)
        # Without its light end, which is too light for lines on white.
        palette = ListedColormap(matplotlib.colormaps[SEQUENTIAL](np.linspace(0, 0.92, 256)))
        for (role, lines), panel in zip(curves.items(), panels, strict=True):
            alpha = 0.9 if len(lines) <= 40 else 0.35  # experts: many lines for one block
            for block, values in lines:
                colour = FAINT if block is None else palette(depth(block))
                x, y = _decay(values)
                panel.plot(x, _cut(y), color=colour, alpha=alpha, linewidth=1.2)
            panel.set_title(role)
        _decay_axes(panels)
        if len(set(blocks)) > 1:
            shown = ScalarMappable(depth, palette)
            bar = figure.colorbar(shown, ax=list(panels), label="block", aspect=30, pad=0.015)
            bar.locator = MaxNLocator(integer=True, nbins=8)
            bar.outline.set_visible(False)
    return figure


def decay_bands_plot(
    models: Mapping[str, Mapping[str, Sequence[ArrayLike]]], title: str = "Decay of the singular values"
) -> Figure:
    """Several models side by side: one panel for each role, the median over matrices as a line, all within a band.

    The band ends where the first of the matrices is numerically zero, the line where half of them are.

    Args:
        models: model -> role -> singular values of its matrices, each descending.
        title: heading of the picture.
    """
    roles = list(dict.fromkeys(role for model in models.values() for role in model))
    colour = colours(tuple(models))
    grid = np.linspace(0, 1, 201)[1:]
    with styled():
        figure, panels = _panels(roles, title)
        for role, panel in zip(roles, panels, strict=True):
            for name, model in models.items():
                lines = [_on_grid(grid, *_decay(values)) for values in model.get(role, ())]
                if not lines:
                    continue
                low, middle, high = map(_cut, np.percentile(lines, (0, 50, 100), axis=0))
                panel.fill_between(grid, low, high, color=colour[name], alpha=0.15, linewidth=0)
                panel.plot(grid, middle, color=colour[name])
            panel.set_title(role)
        _decay_axes(panels)
        handles = [Line2D([], [], color=colour[name], label=name) for name in models]
        _legend(figure, handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    return figure


def heatmap_plot(
    values: ArrayLike,
    blocks: Sequence[str],
    roles: Sequence[str],
    *,
    title: str,
    label: str,
    limits: tuple[float, float] | None = None,
    diverging: bool = False,
) -> Figure:
    """A map of one number over block and role, with the numbers in the cells while they fit.

    Args:
        values: [len(roles), len(blocks)]; NaN where a block has no such role.
        blocks: labels of the columns.
        roles: labels of the rows.
        title: heading of the picture.
        label: what the colour means, with its formula.
        limits: ends of the colour scale; the least and the largest value when None.
        diverging: the sign matters: white at 0, one colour on each side.
    """
    numbers = np.asarray(values, dtype=float)
    low, high = limits or _limits(numbers, diverging)
    norm = TwoSlopeNorm(0, low, high) if diverging else Normalize(low, high)
    written = len(blocks) <= 24
    with styled():
        width = 2.6 + len(blocks) * (0.46 if written else 0.16)
        width = max(5.6, TITLE_LETTER * len(title), min(width, 16))
        figure = Figure(figsize=(width, 1.7 + 0.4 * len(roles)))
        axes = figure.subplots()
        palette = matplotlib.colormaps[DIVERGING if diverging else SEQUENTIAL].with_extremes(bad=EMPTY_CELL)
        image = axes.imshow(np.ma.masked_invalid(numbers), cmap=palette, norm=norm, aspect="auto")
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        step = max(1, math.ceil(len(blocks) / 40))
        axes.set_xticks(range(0, len(blocks), step), blocks[::step])
        axes.set_yticks(range(len(roles)), roles)
        axes.set_xlabel("block")
        axes.set_title(title, loc="left", pad=10, parse_math=False)
        if written:
            _write_cells(axes, numbers, norm, palette, signed=diverging)
        bar = figure.colorbar(image, ax=axes, label=label, aspect=18, pad=0.02)
        bar.outline.set_visible(False)
    return figure


def place_means(numbers: Iterable[tuple[str, int | None, float]]) -> dict[tuple[str, str], float]:
    """(role, block), as `places_plot` takes them -> the mean of the numbers there, such as those of experts."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for role, block, number in numbers:
        found[role, "-" if block is None else str(block)].append(number)
    return {place: sum(here) / len(here) for place, here in found.items()}


def places_plot(places: Mapping[tuple[str, str], float], *, title: str, label: str, **options: Any) -> Figure:
    """`heatmap_plot` of a number for each (role, block), in the order in which they come; options are its own."""
    roles = list(dict.fromkeys(role for role, _ in places))
    blocks = list(dict.fromkeys(block for _, block in places))
    grid = [[places.get((role, block), math.nan) for block in blocks] for role in roles]
    return heatmap_plot(grid, blocks, roles, title=title, label=label, **options)


def pareto_plot(
    series: Mapping[str, Sequence[tuple[float, float, str]]],
    *,
    x_label: str,
    y_label: str,
    title: str,
    log_y: bool = False,
    marked: str = "dense",
) -> Figure:
    """Quality against size, lower is better on both: one line for each series, and the front of all of them.

    Args:
        series: name -> (x, y, label of the point). Points whose y is not finite are left out.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        title: heading of the picture.
        log_y: logarithmic y axis.
        marked: points with this label get a ring, such as the uncompressed models.
    """
    finite = {name: sorted(p for p in points if math.isfinite(p[1])) for name, points in series.items()}
    colour = colours(tuple(series))
    with styled():
        figure = Figure(figsize=(7.6, 4.8))
        axes = figure.subplots()
        handles: list[Line2D] = []
        front = _front([point for points in finite.values() for point in points])
        axes.plot(*zip(*front, strict=True), color=FAINT, linewidth=5, alpha=0.28, solid_capstyle="round", zorder=1)
        for marker, (name, points) in zip(_cycle(MARKERS, len(finite)), finite.items(), strict=True):
            x, y = [p[0] for p in points], [p[1] for p in points]
            handles += axes.plot(x, y, color=colour[name], marker=marker, mec="white", mew=0.8, label=name)
            rings = [p for p in points if p[2] == marked]
            axes.scatter(
                [p[0] for p in rings],
                [p[1] for p in rings],
                s=150,
                facecolors="none",
                edgecolors=colour[name],
                zorder=3,
            )
        if log_y and front:
            _log_axis(axes)
        axes.margins(x=0.05, y=0.08)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(title, loc="left", pad=10, parse_math=False)
        if any(p[2] == marked for points in finite.values() for p in points):
            handles.append(
                Line2D(
                    [],
                    [],
                    linestyle="none",
                    marker="o",
                    markersize=11,
                    markeredgecolor=INK,
                    markerfacecolor="none",
                    label=marked,
                )
            )
        handles.append(Line2D([], [], color=FAINT, linewidth=5, alpha=0.28, label="best of all"))
        _legend(figure, handles=handles, loc="outside right upper", labelspacing=0.8)
    return figure


def _panels(roles: list[str], title: str) -> tuple[Figure, list[Axes]]:
    """A figure with one panel for each role, at most four in a row."""
    rows = max(1, math.ceil(len(roles) / 4))
    columns = max(1, math.ceil(len(roles) / rows))
    width = max(1.4 + 2.7 * columns, TITLE_LETTER * len(title))
    figure = Figure(figsize=(width, 1.0 + 2.3 * rows))
    figure.suptitle(title, x=0.01, ha="left", parse_math=False)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for empty in panels[len(roles) :]:
        empty.remove()
    return figure, panels[: len(roles)]


def _legend(figure: Figure, **options: Any) -> None:
    """A legend of names as they are: a `$` in a folder's name starts no formula."""
    for text in figure.legend(**options).get_texts():
        text.set_parse_math(False)


def _decay(values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """x = i / min(m, n) for i from 1 on, y = sigma_i / sigma_1; all 0 for the zero matrix."""
    s = np.asarray(values, dtype=float)
    x = np.arange(1, len(s) + 1) / len(s)
    return x, s / s[0] if s[0] > 0 else np.zeros_like(s)


def _cut(y: np.ndarray) -> np.ndarray:
    """`y` with NaN, which is not drawn, where it is numerically zero."""
    return np.where(y >= DECAY_FLOOR, y, np.nan)


def _on_grid(grid: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`y` at other places; 0, and nothing in between, from where it is numerically zero."""
    return np.nan_to_num(np.interp(grid, x, _cut(y)))


def _decay_axes(panels: Sequence[Axes]) -> None:
    for panel in panels:
        panel.set_yscale("log", subs=(2, 5))  # all eight in a decade take a third of the drawing time
        panel.set_xlim(0, 1)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        spec = panel.get_subplotspec()
        panel.set_ylabel(DECAY_Y if spec is None or spec.is_first_col() else "")
    columns = max((spec.colspan.stop for panel in panels if (spec := panel.get_subplotspec())), default=1)
    for panel in panels[-columns:]:  # the lowest of each column
        panel.set_xlabel(DECAY_X)
        panel.tick_params(labelbottom=True)


def _write_cells(axes: Axes, numbers: np.ndarray, norm: Normalize, palette: Colormap, *, signed: bool) -> None:
    for (row, column), number in np.ndenumerate(numbers):
        if not math.isfinite(number):
            continue
        red, green, blue, _ = palette(norm(number))
        # Rec. 709 luma: dark text on light cells and light text on dark ones.
        light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5
        number = round(number, 2) + 0.0  # no "-0.00"
        text = f"{number:+.2f}" if signed and number else f"{number:.2f}"
        text = re.sub(r"^([+-]?)0\.", r"\1.", text).replace("-", "−")
        axes.text(column, row, text, ha="center", va="center", fontsize=8.5, color=INK if light else "white")


def _limits(numbers: np.ndarray, diverging: bool) -> tuple[float, float]:
    shown = numbers[np.isfinite(numbers)]
    if shown.size == 0:
        return (-1.0, 1.0) if diverging else (0.0, 1.0)
    if diverging:
        reach = float(np.abs(shown).max()) or 1.0
        return -reach, reach
    return float(shown.min()), float(shown.max())


def _log_axis(axes: Axes) -> None:
    """A log axis whose ticks read as plain numbers, also when it spans less than a decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _front(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float]]:
    """The points no other point beats in both x and y, as the corners of a staircase."""
    corners: list[tuple[float, float]] = []
    for x, y, _ in sorted(points):
        if not corners:
            corners.append((x, y))
        elif y < corners[-1][1]:
            corners += [(x, corners[-1][1]), (x, y)]
    return corners


def _cycle(items: Sequence[str], count: int) -> list[str]:
    return [items[i % len(items)] for i in range(count)]
