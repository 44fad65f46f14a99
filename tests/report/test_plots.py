"""Pictures show the numbers they are given, and nothing in them overlaps or is cut off."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text

from lowrank_kit.report.plots import decay_bands_plot, decay_plot, heatmap_plot, pareto_plot
from lowrank_kit.report.size_plots import size_plot

ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def spectrum(size: int, speed: float, rank: int | None = None) -> np.ndarray:
    s = 3 * np.exp(-speed * np.arange(size) / size)
    s[rank:] = 0 if rank is not None else s[rank:]
    return s


def curves(roles: tuple[str, ...], blocks: int) -> dict[str, list[tuple[int | None, np.ndarray]]]:
    return {role: [(b, spectrum(64, 2 + b + len(role))) for b in range(blocks)] for role in roles}


def decay(roles: int, blocks: int) -> Figure:
    return decay_plot(curves(ROLES[:roles], blocks), "runs/numuon: decay of the singular values")


def bands(roles: int, models: int) -> Figure:
    found = {
        f"model-{i}": {
            role: [values * (i + 1) for _, values in lines] for role, lines in curves(ROLES[:roles], 3).items()
        }
        for i in range(models)
    }
    return decay_bands_plot(found)


def heatmap(blocks: int, diverging: bool = False) -> Figure:
    values = np.random.default_rng(0).uniform(-0.3 if diverging else 0, 1, (7, blocks))
    values[2, 0] = math.nan
    label = r"$e^H / \min(m, n)$"
    names = [str(b) for b in range(blocks)]
    return heatmap_plot(values, names, ROLES, title="Effective rank", label=label, diverging=diverging)


SERIES = {
    "AdamW": [(1.0, 25.3, "dense"), (0.85, 25.5, ""), (0.55, 26.9, "")],
    "Muon": [(1.0, 16.2, "dense"), (0.85, 18.5, ""), (0.55, 146.0, "")],
    "NuMuon": [(0.55, 22.5, ""), (1.0, 20.0, "dense"), (0.4, math.inf, "")],
}


def pareto(log_y: bool = True) -> Figure:
    labels = {"x_label": "parameters kept", "y_label": "perplexity", "title": "Perplexity against parameters kept"}
    return pareto_plot(SERIES, **labels, log_y=log_y)


def sizes(columns: int = 4, rows: int = 2, top: float = 4.0) -> Figure:
    lines = {
        (name, kind): [(size, (size / 32) ** power * (1 + shift)) for size in (32, 64, 128)]
        for name, power in (("muP", 0.02), ("SP", math.log2(top) / 2))
        for kind, shift in (("mlp", 0.0), ("attention", 0.1))
    }
    panels = [[(f"C{column}", "width", lines) for column in range(columns)] for _ in range(rows)]
    return size_plot(panels, title="Spectral check", y_label="RMS", bound=0.15)


PICTURES: dict[str, Callable[[], Figure]] = {
    "decay of 7 roles, 12 blocks": lambda: decay(7, 12),
    "decay of 1 role, 1 block": lambda: decay(1, 1),
    "bands of 3 models": lambda: bands(7, 3),
    "bands of 6 models, 5 roles": lambda: bands(5, 6),
    "heat map of 1 block": lambda: heatmap(1),
    "heat map of 24 blocks": lambda: heatmap(24),
    "heat map of 96 blocks": lambda: heatmap(96),
    "heat map of differences": lambda: heatmap(12, diverging=True),
    "pareto": lambda: pareto(log_y=False),
    "pareto, log": pareto,
    "sizes, 8 panels": sizes,
    "sizes, 2 panels": lambda: sizes(2, 1),
    "sizes, 1 panel, small range": lambda: sizes(1, 1, top=1.1),
    "sizes, wide range": lambda: sizes(4, 2, top=1000.0),
}


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES)
def test_nothing_overlaps_and_nothing_is_cut_off(make: Callable[[], Figure]) -> None:
    settings = dict(matplotlib.rcParams)
    figure = make()
    assert dict(matplotlib.rcParams) == settings
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    drawn = drawn_texts(figure)
    boxes = {text: text.get_window_extent(renderer) for text in drawn}
    for text, box in boxes.items():
        assert figure.bbox.x0 - 1 <= box.x0 < box.x1 <= figure.bbox.x1 + 1, text
        assert figure.bbox.y0 - 1 <= box.y0 < box.y1 <= figure.bbox.y1 + 1, text
    for one, other in itertools.combinations(drawn, 2):
        # A box has room for ascenders and descenders; touching ones do not overlap to the eye.
        assert not boxes[one].shrunk(0.95, 0.8).overlaps(boxes[other].shrunk(0.95, 0.8)), (one, other)
    for legend in figure.legends:
        box = legend.get_window_extent(renderer)
        assert not any(box.overlaps(axes.get_window_extent(renderer)) for axes in figure.axes)


def drawn_texts(figure: Figure) -> list[Text]:
    """All texts but the labels of ticks beyond the ends of their axis, which exist and are not drawn."""
    beyond: set[Text] = set()
    for axes, name in itertools.product(figure.axes, ("xaxis", "yaxis")):
        axis = getattr(axes, name)
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                beyond |= {tick.label1, tick.label2}
    texts = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [text for text in texts if text not in beyond]


def xy(line: Any) -> np.ndarray:
    return np.asarray(line.get_xydata(), dtype=float)


def test_sizes_are_drawn_relative_to_the_base_and_what_is_no_number_is_left_out() -> None:
    lines = {("muP", "mlp"): [(64, 6.0), (32, 3.0), (128, math.nan)], ("SP", "mlp"): [(32, math.nan), (64, 1.0)]}
    figure = size_plot([[("C", "width", lines)]], title="", y_label="", bound=0.5)
    drawn, empty = figure.axes[0].lines
    np.testing.assert_allclose(xy(drawn), [(32, 1), (64, 2)])
    assert len(xy(empty)) == 0
    wedge = figure.axes[0].collections[0].get_paths()[0].vertices
    assert np.asarray(wedge)[:, 1].max() == pytest.approx(2.0)  # (128 / 32)^.5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["muP", "SP", "slope up to 0.5"]


def test_decay_draws_the_ratio_to_the_first_against_the_share() -> None:
    figure = decay_plot({"q": [(0, spectrum(4, 1.0))], "k": [(None, spectrum(8, 1.0, rank=3)), (2, np.zeros(8))]})
    q, k = figure.axes[:2]
    assert [axes.get_title() for axes in (q, k)] == ["q", "k"]
    assert q.get_yscale() == "log"
    np.testing.assert_allclose(xy(q.lines[0]), np.stack([np.arange(1, 5) / 4, np.exp(-np.arange(4) / 4)], axis=1))
    assert np.isfinite(xy(k.lines[0])[:, 1]).tolist() == [True] * 3 + [False] * 5  # zeros have no logarithm
    assert not np.isfinite(xy(k.lines[1])[:, 1]).any()


def test_decay_colours_depth_as_the_colour_bar_says() -> None:
    figure = decay(1, 3)
    lines, bar = figure.axes[0].lines, figure.axes[-1]
    assert bar.get_ylabel() == "block"
    shown: Any = next(child for child in bar.get_children() if isinstance(child, QuadMesh))
    colours: list[Any] = [line.get_color() for line in lines]
    assert len(set(colours)) == 3
    for block, colour in enumerate(colours):
        np.testing.assert_allclose(shown.cmap(shown.norm(block)), colour)


def test_bands_are_median_and_range() -> None:
    values = [spectrum(200, speed) for speed in (1.0, 2.0, 4.0)]
    axes = decay_bands_plot({"m": {"q": values}}).axes[0]
    np.testing.assert_allclose(xy(axes.lines[0])[:, 1], values[1] / 3, rtol=1e-9)
    ends = np.asarray(axes.collections[0].get_paths()[0].vertices)[:, 1]
    assert math.isclose(ends.min(), values[2][-1] / 3)
    assert math.isclose(ends.max(), 1.0)


def test_bands_end_where_the_values_do() -> None:
    """Ranks 2, 3 and 4 of 5: all within the band up to 2 / 5, half of them above zero up to 3 / 5, no slope between."""
    axes = decay_bands_plot({"m": {"q": [spectrum(5, 1.0, rank=rank) for rank in (2, 3, 4)]}}).axes[0]
    x, y = xy(axes.lines[0]).T
    assert x[np.isfinite(y)].max() == pytest.approx(0.6)
    np.testing.assert_allclose(y[np.isfinite(y)].min(), math.exp(-2 / 5))
    assert np.asarray(axes.collections[0].get_paths()[0].vertices)[:, 0].max() == pytest.approx(0.4)


def test_the_lowest_panel_of_each_column_tells_its_x_axis() -> None:
    figure = decay(7, 2)
    assert [bool(axes.get_xlabel()) for axes in figure.axes[:7]] == [False] * 3 + [True] * 4
    assert [bool(axes.get_ylabel()) for axes in figure.axes[:7]] == [True, False, False, False, True, False, False]


@pytest.mark.parametrize("name", ["a$b", r"$\nothing$", "_hidden"])
def test_any_name_of_a_folder_is_shown_as_it_is(name: str) -> None:
    values = [spectrum(4, 1.0)]
    for figure in (
        decay_bands_plot({name: {"q": values}}, name),
        pareto_plot({name: [(0, 1, "")]}, x_label="x", y_label="y", title=name),
    ):
        FigureCanvasAgg(figure).draw()
        assert name in [text.get_text() for text in figure.legends[0].get_texts()]
    FigureCanvasAgg(heatmap_plot([[0.0]], ["0"], ["q"], title=name, label="l")).draw()


def test_no_window_is_ever_asked_for() -> None:
    code = """if True:
        import sys
        from lowrank_kit.report.files import write_png
        from lowrank_kit.report.plots import heatmap_plot
        write_png(sys.argv[1], heatmap_plot([[0.0]], ["0"], ["q"], title="t", label="l"))
        assert "matplotlib.pyplot" not in sys.modules
    """
    with TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", code, f"{folder}/a.png"], check=True)


def test_heatmap_writes_its_numbers_while_they_fit() -> None:
    numbers = [[0.123, 1.0], [math.nan, 10.5]]
    axes = heatmap_plot(numbers, ["0", "1"], ["q", "k"], title="t", label="l").axes[0]
    assert [text.get_text() for text in axes.texts] == [".12", "1.00", "10.50"]
    drawn: Any = axes.images[0].get_array()
    assert np.ma.getmaskarray(drawn).tolist() == [[False, False], [True, False]]
    differences = heatmap_plot([[-0.001, 0.25, -0.5]], ["0", "1", "2"], ["q"], title="t", label="l", diverging=True)
    assert [text.get_text() for text in differences.axes[0].texts] == [".00", "+.25", "−.50"]
    assert differences.axes[0].images[0].get_clim() == (-0.5, 0.5)
    assert not heatmap(96).axes[0].texts


def test_heatmap_limits() -> None:
    figure = heatmap_plot([[0.4, 0.6]], ["0", "1"], ["q"], title="t", label="l", limits=(0, 1))
    assert figure.axes[0].images[0].get_clim() == (0, 1)


def test_pareto_draws_points_rings_and_the_front() -> None:
    axes = pareto().axes[0]
    front, *series = axes.lines
    assert [line.get_label() for line in series] == list(SERIES)
    np.testing.assert_allclose(xy(series[2]), [(0.55, 22.5), (1.0, 20.0)])  # sorted, without the infinite one
    np.testing.assert_allclose(xy(front), [(0.55, 22.5), (0.85, 22.5), (0.85, 18.5), (1.0, 18.5), (1.0, 16.2)])
    rings = np.concatenate([np.asarray(ring.get_offsets()) for ring in axes.collections])
    np.testing.assert_allclose(rings, [(1.0, 25.3), (1.0, 16.2), (1.0, 20.0)])
    assert axes.get_yscale() == "log"
    assert len({line.get_color() for line in series}) == 3


def test_a_log_axis_of_less_than_a_decade_has_ticks_in_plain_numbers() -> None:
    figure = pareto_plot({"a": [(0, 21.0, ""), (1, 33.0, "")]}, x_label="x", y_label="y", title="t", log_y=True)
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    shown = [tick.label1.get_text() for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert "30" in shown


@pytest.mark.parametrize(
    "make",
    [
        lambda: decay_plot({}),
        lambda: decay_bands_plot({}),
        lambda: decay_bands_plot({"a": {"q": []}}),
        lambda: heatmap_plot([[math.nan]], ["0"], ["q"], title="t", label="l"),
        lambda: heatmap_plot([[0.0]], ["0"], ["q"], title="t", label="l", diverging=True),
        lambda: pareto_plot({"a": [(1, math.nan, "")]}, x_label="x", y_label="y", title="t", log_y=True),
        lambda: pareto_plot({}, x_label="x", y_label="y", title="t"),
    ],
)
def test_nothing_to_draw_is_an_empty_picture(make: Callable[[], Figure]) -> None:
    FigureCanvasAgg(make()).draw()
