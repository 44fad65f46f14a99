"""Results of `lowrank analyze`: singular values by role, effective rank by role and block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_kit.report.page import Fold, Part, Picture, Table, Text
from lowrank_kit.report.plots import decay_bands_plot, decay_plot, place_means, places_plot
from lowrank_kit.spectra.write import EFFECTIVE_RANK
from lowrank_kit.summary.find import Found

MOST_MATRICES = 240
MEASURES = {
    "effective_rank_share": "effective rank",
    "stable_rank_share": "stable rank",
    "rank_90_share": "rank at 90 %",
    "rank_95_share": "95 %",
    "rank_99_share": "99 % of the energy",
}
Places = dict[tuple[str, str], float]
Lines = dict[str, list[tuple[int | None, Sequence[float]]]]


def spectra_parts(one: Found) -> list[Part]:
    """A table by role, and for each model, or two against each other, the pictures."""
    document = one.document
    models = {model["name"]: model for model in document["models"]}
    caption = "By role, each as a share of min(m, n): the mean over matrices"
    rows = [
        {"model": name, **summary}
        for name, model in models.items()
        for summary in [*model["roles"], {**model["overall"], "role": "all"}]
    ]
    parts: list[Part] = [
        Table(rows, {"model": "model", "role": "role", "num_matrices": "matrices", **MEASURES}, caption)
    ]
    lines = {name: _lines(model, document["singular_values"].get(name, {})) for name, model in models.items()}
    for name, model in models.items():
        parts += _pictures(name, model, lines[name])
    if len(models) == 2:
        parts += _against(models, lines)
    matrices = [{"model": name, **row} for name, model in models.items() for row in model["matrices"]]
    columns = {
        "model": "model",
        "name": "matrix",
        "role": "role",
        "block": "block",
        "out": "out",
        "in": "in",
        **MEASURES,
    }
    return [*parts, Fold(f"All {len(matrices):,} matrices", [Table(matrices, columns)])]


def _pictures(name: str, model: Mapping[str, Any], lines: Lines) -> list[Part]:
    title = f"Effective rank of {name}"
    figure = places_plot(_shares(model), title=title, label=EFFECTIVE_RANK, limits=(0.0, 1.0))
    parts: list[Part] = [Picture(figure, f"{title} as a share of min(m, n), by role and block")]
    if drawn := sum(map(len, lines.values())):
        title = f"Singular values of {name}"
        parts.insert(0, Picture(decay_plot(lines, title), f"{title}, as shares of the largest, a panel for each role"))
        if left := len(model["matrices"]) - drawn:
            parts.insert(1, Text(f"Drawn are {drawn:,} matrices, evenly chosen; {left:,} are left out."))
    return parts


def _against(models: Mapping[str, Mapping[str, Any]], lines: Mapping[str, Lines]) -> list[Part]:
    first, second = models
    bands = {name: {role: [s for _, s in drawn] for role, drawn in roles.items()} for name, roles in lines.items()}
    before, after = _shares(models[first]), _shares(models[second])
    change = {place: after[place] - before[place] for place in before if place in after}
    parts: list[Part] = []
    if all(lines.values()):
        title = f"Singular values of {first} and {second}"
        parts.append(Picture(decay_bands_plot(bands, title), f"{title}: medians and ranges by role"))
    if change:
        title = f"Effective rank of {second} less that of {first}"
        parts.append(Picture(places_plot(change, title=title, label=EFFECTIVE_RANK, diverging=True), title))
    return parts


def _lines(model: Mapping[str, Any], values: Mapping[str, Sequence[float]]) -> Lines:
    """Role -> (block, singular values) of at most `MOST_MATRICES`."""
    rows = [row for row in model["matrices"] if row["name"] in values]
    step = -(-len(rows) // MOST_MATRICES) or 1
    lines: Lines = defaultdict(list)
    for row in rows:
        lines[row["role"]]  # keeps the order of roles
    for role, drawn in lines.items():
        here = [row for row in rows if row["role"] == role]
        drawn += [(row["block"], values[row["name"]]) for row in here[::step]]
    return dict(lines)


def _shares(model: Mapping[str, Any]) -> Places:
    """(role, block) -> effective rank as a share of min(m, n), the mean over experts."""
    known = (row for row in model["matrices"] if row["effective_rank_share"] is not None)
    return place_means((row["role"], row["block"], row["effective_rank_share"]) for row in known)
