"""The tables in README.md, to standard output, and front.png, from results.json.

python evals/defaults/table.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lowrank_kit.quickstart import KEEPS
from lowrank_kit.report.files import write_png
from lowrank_kit.report.plots import pareto_plot
from lowrank_kit.report.tables import markdown_table

HERE = Path(__file__).parent
# More lines than these cannot be told apart.
PICTURED = (
    "AdamW",
    "AdamW, decay 2",
    "Muon",
    "Muon, decay .6",
    "NuMuon fixed .7",
    "NuMuon fixed .7, decay .6",
)
SIZES = ("dense", *(f"{keep:g}" for keep in KEEPS))


def main() -> None:
    trials = json.loads((HERE / "results.json").read_text())["trials"]
    tuning = [t for t in trials if t["trial"]["stage"] == "tune"]
    names = json.loads((HERE / "trials.json").read_text())["report"]
    by_name = {name: [t for t in trials if t["trial"].get("name") == name] for name in sorted(names)}
    chosen = {name: runs for name, runs in by_name.items() if runs}
    parts = ["## Over seeds, on the held-out part", markdown_table([_report_row(*item) for item in chosen.items()])]
    parts += ["## Trials, one seed, on a split of the training part", markdown_table([_tune_row(t) for t in tuning])]
    print("\n\n".join(parts))
    if chosen:
        figure = pareto_plot(
            {name: _curve(chosen[name]) for name in PICTURED if name in chosen},
            x_label="matrix parameters kept",
            y_label="held-out loss, nats per token",
            title="Loss against parameters kept, mean of the seeds",
        )
        write_png(HERE / "front.png", figure)


def _tune_row(trial: dict[str, Any]) -> dict[str, Any]:
    settings = trial["trial"]["settings"]
    averaged = settings["optimizer"] != "adamw"
    return {
        "optimizer": settings["optimizer"],
        "lr": f"{settings['lr']:g}",
        "rank": settings.get("rank"),
        "spectral decay": f"{settings.get('spectral_decay', 0):g}",
        "momentum": f"{settings.get('momentum', 0.95):g}" if averaged else None,
        "Nesterov": ("yes" if settings.get("nesterov", True) else "no") if averaged else None,
        **{size: f"{trial['perplexity'][size]:.1f}" for size in SIZES},
        "effective rank": f"{trial['effective_rank_share']:.2f}",
    }


def _report_row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"optimizer": name, "seeds": len(runs)}
    for size in SIZES:
        losses = [math.log(run["perplexity"][size]) for run in runs]
        spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
        row[size] = f"{mean(losses):.3f}{spread}"
    row["effective rank"] = f"{mean(run['effective_rank_share'] for run in runs):.2f}"
    return row


def _curve(runs: list[dict[str, Any]]) -> list[tuple[float, float, str]]:
    kept = (1.0, *KEEPS)
    return [
        (x, mean(math.log(run["perplexity"][size]) for run in runs), size) for x, size in zip(kept, SIZES, strict=True)
    ]


if __name__ == "__main__":
    main()
