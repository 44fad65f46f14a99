"""The tables in README.md, to standard output, and front.png, from results.json.

python evals/finetune/finetune_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lowrank_kit.report.files import write_png
from lowrank_kit.report.plots import pareto_plot
from lowrank_kit.report.tables import markdown_table

HERE = Path(__file__).parent
SIZES = ("dense", "0.6", "0.4")
# Beside the others LoRA, which learns and forgets far less, leaves nothing to see.
PICTURED = ("AdamW", "AdamW, decay 1", "Muon", "Muon, decay .6", "NuMuon .7, decay .6", "NuMuon .25")


def main() -> None:
    trials = json.loads((HERE / "results.json").read_text())["trials"]
    names = ["before", *json.loads((HERE / "trials.json").read_text())["report"]]
    reported = {name: [t for t in trials if t["trial"].get("name") == name] for name in names}
    reported = {name: runs for name, runs in reported.items() if runs}
    tuning = [t for t in trials if t["trial"]["stage"] == "tune"]
    parts = ["## Over seeds, on the held-out parts", markdown_table([_report_row(*item) for item in reported.items()])]
    parts += ["## Trials, one seed, on splits of the training parts", markdown_table([_tune_row(t) for t in tuning])]
    print("\n\n".join(parts))
    pictured = {name: _curve(reported[name]) for name in PICTURED if name in reported}
    if pictured:
        figure = pareto_plot(
            pictured,
            x_label="loss on the old text, nats per token",
            y_label="loss on the new text, nats per token",
            title="Learned and forgotten: dense, keep .6, keep .4",
        )
        write_png(HERE / "front.png", figure)


def _report_row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"": name, "seeds": len(runs)}
    for side in ("new", "old"):
        for size in SIZES:
            row[f"{side}, {size}"] = _spread([run["loss"][size][side] for run in runs])
    row["effective rank"] = f"{mean(run['effective_rank_share'] for run in runs):.2f}"
    row["change"] = f"{mean(run['change'] for run in runs):.2f}"
    return row


def _spread(losses: list[float]) -> str:
    return f"{mean(losses):.3f}" + (f" ± {stdev(losses):.3f}" if len(losses) > 1 else "")


def _tune_row(trial: dict[str, Any]) -> dict[str, Any]:
    settings = trial["trial"]["settings"] or {"optimizer": "before"}
    lora = f", LoRA {settings['lora']}" if "lora" in settings else ""
    return {
        "optimizer": settings["optimizer"] + lora,
        "lr": f"{settings['lr']:g}" if "lr" in settings else None,
        "rank": settings.get("rank"),
        "spectral decay": f"{settings.get('spectral_decay', 0):g}",
        **{f"new, {size}": f"{trial['loss'][size]['new']:.3f}" for size in SIZES},
        **{f"old, {size}": f"{trial['loss'][size]['old']:.3f}" for size in SIZES},
        "effective rank": f"{trial['effective_rank_share']:.2f}",
        "change": f"{trial['change']:.2f}",
    }


def _curve(runs: list[dict[str, Any]]) -> list[tuple[float, float, str]]:
    return [
        (mean(run["loss"][size]["old"] for run in runs), mean(run["loss"][size]["new"] for run in runs), size)
        for size in SIZES
    ]


if __name__ == "__main__":
    main()
