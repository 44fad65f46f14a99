"""U curves: what is drawn, and what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lowrank_kit.report.curves import UCurve, u_curves_plot
from lowrank_kit.report.files import write_png

X = (-6.0, -5.0, -4.0)


def test_lines_bands_and_marks(tmp_path: Path) -> None:
    small = UCurve(X, np.array([[3.0, 2.0, 2.5], [3.2, 2.2, 2.7]]), (-4.9, 2.1), True)
    large = UCurve(X, np.array([[2.9, 1.9, np.inf], [2.9, 2.1, np.nan]]), None, False)
    rows = [[("mup", {"width 32": small, "width 64": large}), ("plain", {"width 32": small})]]
    figure = u_curves_plot(rows, "cost: $5")
    first, second = figure.subfigs[0].axes
    lines = {tuple(np.asarray(line.get_ydata()).tolist()): line for line in first.lines}
    assert (3.1, 2.1, 2.6) in lines, "the mean over seeds"
    assert (2.1,) in lines, "the best"
    np.testing.assert_array_equal(first.lines[-1].get_ydata(), [2.9, 2.0, np.nan])
    assert len(first.lines) == 4, "the base's best is a line across, and what has none is not marked"
    assert len(first.collections) == 2
    assert first.get_ylim() == second.get_ylim()
    low, high = first.get_ylim()
    assert low < 1.9
    assert 3.2 < high < 3.6
    labels = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
    assert labels == ["width 32", "width 64", "best", "best of the base"]
    write_png(tmp_path / "plot.png", figure)


def test_what_failed_does_not_flatten_what_did_not() -> None:
    curve = UCurve(X, np.array([[1e25, 2.0, 2.5]]), None, False)
    figure = u_curves_plot([[("mup", {"a": curve})]], "title")
    assert figure.subfigs[0].axes[0].get_ylim()[1] < 4
    u_curves_plot([[("mup", {"a": UCurve(X, np.full((1, 3), np.inf), None, False)})]], "all diverged")
