"""Checks as files: JSON, CSV and a picture of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lowrank_kit.report.files import new_folder, write_csv, write_json, write_png
from lowrank_kit.report.size_plots import Lines, size_plot
from lowrank_kit.scaling.checks import AXES, BOUND, Check
from lowrank_kit.scaling.observe import STREAM, Row

Y_LABELS = {"spectral": r"$L\,c\,R(W_2)\,R(W_1)$", "coordinate": "RMS"}
LABELS = {"k2": "muP", "k1": "muP, k1", "none": "muP, width alone"}


def write_checks(output: Path, rows: Sequence[Row], checks: Sequence[Check], document: Mapping[str, Any]) -> None:
    """Fill a new folder: check.json, check.csv with all that was measured, and for each check its picture.

    Args:
        output: folder to make; appears whole or not at all.
        rows: of `observe`.
        checks: what was made of them.
        document: what goes into check.json.

    Raises:
        UsageError: the folder is not empty.
    """
    with new_folder(output) as folder:
        write_json(folder / "check.json", document)
        write_csv(folder / "check.csv", rows)
        for check in checks:
            write_png(folder / f"{check.name}.png", check_plot(check))


def check_plot(check: Check, title: str | None = None) -> Figure:
    """A row of panels for each axis, a panel for each condition, a line for each scaling and part."""
    rows = [row for row in check.slopes if row["verdict"]]
    panels: list[list[tuple[str, str, Lines]]] = []
    for axis in AXES:
        lines: dict[str, dict[tuple[str, str], list[tuple[float, float]]]] = {}
        for row in rows:
            if row["axis"] == axis:
                points = list(zip(row["sizes"], row["values"], strict=True))
                label = str(LABELS.get(row["scaling"], row["scaling"]))
                after = f" after {row['step']} steps" if row["part"] == STREAM else ""
                lines.setdefault(row["condition"] + after, {})[label, row["part"]] = points
        panels.append([(heading, axis, found) for heading, found in lines.items()])
    panels = [row for row in panels if row]
    if all(len(row) == 1 for row in panels):  # side by side
        panels = [[panel for row in panels for panel in row]]
    title = title or f"{check.name.capitalize()} check: flat is right"
    return size_plot(panels, title=title, y_label=Y_LABELS[check.name], bound=BOUND)
