"""Results of `lowrank compress`: ranks by role and block, what is kept and the error through depth, bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank_kit.compression.record import role_rows, size_rows
from lowrank_kit.report.lines import LinePanel, lines_plot
from lowrank_kit.report.page import Fold, Part, Picture, Table, Text
from lowrank_kit.report.plots import place_means, places_plot
from lowrank_kit.summary.find import Found
from lowrank_kit.summary.models import method_of

COLUMNS = {
    "matrix": "matrix",
    "role": "role",
    "block": "block",
    "out": "out",
    "in": "in",
    "rank": "rank",
    "form": "form",
    "kept": "kept",
    "bytes_before": "bytes before",
    "bytes_after": "bytes after",
    "relative_error": "error",
    "note": "note",
}
Matrices = Sequence[Mapping[str, Any]]


def compression_parts(one: Found) -> list[Part]:
    """How it was compressed and to what loss, sizes, ranks and errors of one model."""
    document = one.document
    matrices: list[dict[str, Any]] = document["matrices"]
    parts: list[Part] = [Text(sentence) for sentence in _sentences(document)]
    sizes = [{"what": row.pop(""), **row} for row in size_rows(document["totals"])]
    parts += [Table(sizes, caption="Sizes"), Table(role_rows(matrices), caption="By role")]
    parts += _pictures(one.name, matrices)
    return [*parts, Fold(f"All {len(matrices):,} matrices", [Table(matrices, COLUMNS)])]


def _sentences(document: Mapping[str, Any]) -> list[str]:
    settings, check = document["settings"], document.get("check") or {}
    found = [f"From {document['model']}; {method_of(settings)}, seed {settings.get('seed')}."]
    if check.get("loss_compressed") is not None:
        dense, here = check["loss_dense"], check["loss_compressed"]
        found.append(
            f"Loss on check text: {dense:.4f} dense, {here:.4f} compressed, {here - dense:+.4f} nats per token."
        )
    if (forecast := document.get("forecast")) and forecast.get("nats") is not None:
        found.append(f"Forecast beforehand: {forecast['nats']:+.4f} nats per token, from {forecast.get('from')}.")
    for stage, figures in (document.get("refined") or {}).items():
        found.append(f"Refined by {stage}: {figures['before']:.4g} to {figures['after']:.4g}.")
    return [*found, *((document.get("choice") or {}).get("reasons") or [])]


def _pictures(name: str, matrices: Matrices) -> list[Part]:
    title = f"Rank fractions of {name}"
    label = r"$r\,/\,\min(m, n)$, 1: dense"
    fractions = place_means((row["role"], row["block"], _fraction(row)) for row in matrices)
    figure = places_plot(fractions, title=title, label=label, limits=(0.0, 1.0))
    parts: list[Part] = [Picture(figure, f"{title}, rank as a share of min(m, n), by role and block; 1 is dense")]
    kept, errors = _through(matrices, "kept"), _through(matrices, "relative_error")
    panels = [LinePanel("Allocation", "block", "fraction of numbers kept", kept)] if kept else []
    panels += [LinePanel("Error", "block", "relative error of outputs", errors)] if errors else []
    if panels:
        title = f"Through the depth of {name}"
        alt = f"{title}: what is kept of each role, and the relative error, by block"
        parts.append(Picture(lines_plot(panels, title=title), alt))
    return parts


def _fraction(row: Mapping[str, Any]) -> float:
    return 1.0 if row["rank"] is None else float(row["rank"] / min(row["out"], row["in"]))


def _through(matrices: Matrices, key: str) -> dict[str, list[tuple[float, float]]]:
    """Role -> (block, mean of a number), for matrices of a block that have it."""
    known = (row for row in matrices if row.get(key) is not None and row["block"] is not None)
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (role, block), value in place_means((row["role"], row["block"], float(row[key])) for row in known).items():
        lines[role].append((float(block), value))
    return dict(lines)
