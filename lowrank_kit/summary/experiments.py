"""Results of experiments: their rows as a table, and the front that they name as a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_kit.errors import LowRankError
from lowrank_kit.report.page import Part, Picture, Table, Text
from lowrank_kit.report.plots import pareto_plot
from lowrank_kit.report.tables import duration
from lowrank_kit.summary.find import Found


def experiment_title(one: Found) -> str:
    """Its title and form."""
    document = one.document
    return f"{document.get('title') or document.get('name')} ({document.get('form')})"


def experiment_parts(one: Found) -> list[Part]:
    """What it was, its front and its rows."""
    document = one.document
    rows = document.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise LowRankError(f"{one.path} is damaged: its rows are no list of rows", hint="make it again, or remove it")
    seeds = ", ".join(map(str, document.get("seeds") or [])) or "none"
    took = f", took {duration(document['wall_seconds'])}" if document.get("wall_seconds") is not None else ""
    parts: list[Part] = [Text(f"Experiment {document.get('name')}: {len(rows):,} rows, seeds {seeds}{took}.")]
    if front := document.get("front"):
        parts += _front(experiment_title(one), rows, front)
    return [*parts, Table(rows)]


def _front(title: str, rows: Sequence[Mapping[str, Any]], front: Mapping[str, str]) -> list[Part]:
    """Pictures of the columns that `front` names; rows without numbers there are left out.

    A picture for each value of the column `picture`, if it names one; rows with the value `in_all` are in all of them.
    """
    of = front.get("picture")
    if of is None:
        return _picture(title, rows, front)
    shared = front.get("in_all")
    return [
        part
        for value in dict.fromkeys(str(row.get(of)) for row in rows if row.get(of) != shared)
        for part in _picture(f"{title}: {value}", [row for row in rows if str(row.get(of)) in (value, shared)], front)
    ]


def _picture(title: str, rows: Sequence[Mapping[str, Any]], front: Mapping[str, str]) -> list[Part]:
    in_bytes = front["x"] == "bytes"
    curves: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for row in rows:
        x, y = row.get(front["x"]), row.get(front["y"])
        if isinstance(x, int | float) and isinstance(y, int | float):
            curves[str(row.get(front["group"], ""))].append((x / 1e6 if in_bytes else x, y, ""))
    if not curves:
        return []
    figure = pareto_plot(curves, x_label="MB" if in_bytes else front["x"], y_label=front["y"], title=title)
    alt = f"{title}: {front['y']} against {front['x']}, {len(curves)} curves, the Pareto front of all is marked"
    return [Picture(figure, alt)]
