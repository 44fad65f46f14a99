"""Tables of the compressor's study."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean, stdev
from typing import Any

from lowrank_kit.report.tables import markdown_table

Run = dict[str, Any]


def tables(runs: list[Run]) -> str:
    """All of them, in Markdown."""
    corpora = list(runs[0]["loss"])
    parts = [f"## {corpus}\n\n{markdown_table(increase_rows(runs, corpus))}" for corpus in corpora]
    return "\n\n".join([*parts, f"## Time\n\n{markdown_table(time_rows(runs))}"])


def increase(runs: Iterable[Run], optimizer: str, method: str, keep: float, corpus: str) -> list[float]:
    """Increase of the loss over the dense model's, in nats per token; one number for each seed."""
    runs = list(runs)
    dense = next(
        r["loss"][corpus] for r in runs if (r["trial"]["optimizer"], r["trial"]["method"]) == (optimizer, "dense")
    )
    wanted = (optimizer, method, keep)
    return [
        run["loss"][corpus] - dense
        for run in runs
        if (run["trial"]["optimizer"], run["trial"]["method"], run["trial"]["keep"]) == wanted
    ]


def increase_rows(runs: list[Run], corpus: str) -> list[dict[str, Any]]:
    """One row per method and optimizer: mean increase at each keep, with the deviation over seeds."""
    methods = dict.fromkeys(r["trial"]["method"] for r in runs if r["trial"]["method"] != "dense")
    keeps = sorted({r["trial"]["keep"] for r in runs if r["trial"]["keep"]}, reverse=True)
    optimizers = list(dict.fromkeys(r["trial"]["optimizer"] for r in runs))
    return [
        {"method": method, "checkpoint": optimizer}
        | {f"keep {keep:g}": _cell(increase(runs, optimizer, method, keep, corpus)) for keep in keeps}
        for method in methods
        for optimizer in optimizers
    ]


def time_rows(runs: list[Run]) -> list[dict[str, Any]]:
    """Median seconds of each stage by method, at keep .4."""
    rows = []
    for method in dict.fromkeys(r["trial"]["method"] for r in runs if r["trial"]["method"] != "dense"):
        here = [r["seconds"] for r in runs if r["trial"]["method"] == method and r["trial"]["keep"] == 0.4]
        if here:
            rows.append(
                {"method": method, **{stage: sorted(s[stage] for s in here)[len(here) // 2] for stage in here[0]}}
            )
    return rows


def _cell(values: list[float]) -> str | None:
    if not values:
        return None
    spread = f" ±{stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):+.4f}{spread}"
