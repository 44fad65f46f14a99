"""Tables of the compressor's study."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from lowrank_kit.report.plots import pareto_plot
from lowrank_kit.report.tables import markdown_table

Run = dict[str, Any]
TRIALS = json.loads((Path(__file__).parent / "trials.json").read_text())
BEST, KEEPS = TRIALS["best"], TRIALS["keeps"]


def tables(runs: list[Run], times: list[dict[str, Any]]) -> str:
    """All of them, in Markdown."""
    corpora = list(runs[0]["loss"])
    several = [run for run in runs if "seeds" not in TRIALS["methods"].get(run["trial"]["method"], {})]
    parts = [
        f"## {corpus}\n\n{markdown_table(increase_rows(runs if corpus == corpora[0] else several, corpus))}"
        for corpus in corpora
    ]
    parts.append(f"## Increase of the best over whiten's\n\n{markdown_table(share_rows(runs, corpora))}")
    return "\n\n".join([*parts, f"## Time\n\n{markdown_table(time_rows(times))}"])


def increase(runs: Iterable[Run], optimizer: str, method: str, keep: float, corpus: str) -> list[float]:
    """Increase of the loss over the dense model's, in nats per token; one number for each seed."""
    runs = list(runs)
    dense = next(
        r["loss"][corpus] for r in runs if (r["trial"]["optimizer"], r["trial"]["method"]) == (optimizer, "dense")
    )
    return [run["loss"][corpus] - dense for run in runs if _is(run, optimizer, method, keep)]


def increase_rows(runs: list[Run], corpus: str) -> list[dict[str, Any]]:
    """One row per method and optimizer: mean increase at each keep, with the deviation over seeds."""
    done = {r["trial"]["method"] for r in runs}
    methods = [method for method in TRIALS["methods"] if method in done]
    optimizers = TRIALS["optimizers"]
    return [
        {"method": method, "checkpoint": optimizer}
        | {f"keep {keep:g}": _cell(increase(runs, optimizer, method, keep, corpus)) for keep in KEEPS}
        for method in methods
        for optimizer in optimizers
    ]


def share_rows(runs: list[Run], corpora: list[str]) -> list[dict[str, Any]]:
    """Mean increase of the best stack as a share of that of whiten."""
    rows = []
    for corpus in corpora:
        for optimizer in TRIALS["optimizers"]:
            cells = {}
            for keep in KEEPS:
                best, whiten = (mean(increase(runs, optimizer, method, keep, corpus)) for method in (BEST, "whiten"))
                # A share of an increase that is none says nothing.
                cells[f"keep {keep:g}"] = f"{best / whiten:.2f}" if whiten > 0 else f"{best:+.4f} for {whiten:+.4f}"
            rows.append({"corpus": corpus, "checkpoint": optimizer, **cells})
    return rows


def time_rows(times: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds by stage of each method, and all together."""
    stages = list(dict.fromkeys(stage for one in times for stage in one["stages"]))
    return [
        {"method": one["method"], **{stage: one["stages"].get(stage) for stage in stages}, "all": one["seconds"]}
        for one in times
    ]


def picture(runs: list[Run]) -> Figure:
    """Held-out loss against the numbers of the matrices that are kept: whiten and the best stack."""
    series = {}
    for optimizer in TRIALS["optimizers"]:
        for label, method in (("whiten", "whiten"), ("auto", BEST)):
            points = []
            for keep in KEEPS:
                here = [r for r in runs if _is(r, optimizer, method, keep)]
                loss = mean(r["loss"]["stdlib"] for r in here)
                points.append((here[0]["numbers"] / 1e6, loss, f"{keep:g}"))
            series[f"{optimizer}, {label}"] = points
    return pareto_plot(
        series,
        x_label="numbers of the matrices kept (millions)",
        y_label="held-out loss (nats per token)",
        title="Loss against parameters kept",
    )


def _is(run: Run, optimizer: str, method: str, keep: float) -> bool:
    trial = run["trial"]
    return (trial["optimizer"], trial["method"], trial["keep"]) == (optimizer, method, keep)


def _cell(values: list[float]) -> str | None:
    if not values:
        return None
    spread = f" ±{stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):+.4f}{spread}"
