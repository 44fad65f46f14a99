"""Runs of `lowrank train`: loss, learning rate and effective rank over the steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_kit.report.lines import LinePanel, lines_plot
from lowrank_kit.report.page import Part, Picture, Section, Table, Text
from lowrank_kit.summary.find import Found, reading

MOST_POINTS = 400
RUNS_IN_A_PICTURE = 6
MOST_RUNS = 24
Log = list[dict[str, Any]]
Points = list[tuple[float, float]]


def training_section(runs: Sequence[Found]) -> Section:
    """A table of the runs, their curves in common pictures, and the effective rank of each."""
    logs = {run.name: read_log(run.folder / "log.jsonl") for run in runs}
    rows = []
    for run in runs:
        with reading(run):
            rows.append(_row(run))
    parts: list[Part] = [Table(rows)]
    shown = [name for name, log in logs.items() if log][:MOST_RUNS]
    for start in range(0, len(shown), RUNS_IN_A_PICTURE):
        parts.append(_curves({name: logs[name] for name in shown[start : start + RUNS_IN_A_PICTURE]}))
    ranked = [name for name in shown if any("effective_rank" in line for line in logs[name])]
    parts += [_ranks({name: logs[name] for name in ranked[at : at + 3]}) for at in range(0, len(ranked), 3)]
    if left := len(runs) - len(shown):
        parts.append(Text(f"{left} runs are without curves: they have no log.jsonl, or are more than {MOST_RUNS}."))
    return Section("Training", parts)


def read_log(path: Path) -> Log:
    """Lines of a log.jsonl; the last may be cut off in a run that was killed. Empty without one."""
    lines: Log = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            lines.append(found)
    return lines


def _row(run: Found) -> dict[str, Any]:
    document, settings = run.document, run.document["settings"]
    step_tokens = document.get("step_tokens")
    return {
        "run": run.name,
        "optimizer": settings.get("optimizer"),
        "learning rate": document.get("peak_lr"),
        "rank": (document.get("chosen") or {}).get("rank") if settings.get("optimizer") == "numuon" else None,
        "spectral decay": (document.get("chosen") or {}).get("spectral_decay"),
        "steps": document.get("step"),
        "tokens": step_tokens and document.get("step", 0) * step_tokens,
        "parameters": document.get("parameters"),
        "in matrices": document.get("matrix_parameters"),
        "validation loss": document.get("validation_loss"),
        "finished": document.get("finished"),
    }


def _points(log: Log, key: str) -> Points:
    found = [(float(line["step"]), float(line[key])) for line in log if isinstance(line.get(key), int | float)]
    step = -(-len(found) // MOST_POINTS) or 1
    return found[::step] + (found[-1:] if found and (len(found) - 1) % step else [])


def _curves(logs: dict[str, Log]) -> Picture:
    wanted = {
        "loss": ("Training", "loss (nats)"),
        "validation_loss": ("Validation", "loss (nats)"),
        "lr": ("Learning rate", "learning rate"),
    }
    panels = [
        LinePanel(heading, "step", label, {name: _points(log, key) for name, log in logs.items()})
        for key, (heading, label) in wanted.items()
    ]
    title = "Loss and learning rate"
    return Picture(lines_plot(panels, title=title), f"{title} over the steps of {', '.join(logs)}")


def _ranks(logs: dict[str, Log]) -> Picture:
    panels = []
    for name, log in logs.items():
        measured = [{"step": line["step"], **line["effective_rank"]} for line in log if "effective_rank" in line]
        roles = dict.fromkeys(role for line in measured for role in line if role != "step")
        lines = {role: _points(measured, role) for role in roles}
        panels.append(LinePanel(name, "step", "effective rank / min(m, n)", lines))
    title = "Effective rank through training"
    return Picture(lines_plot(panels, title=title), f"{title}, by role, of {', '.join(logs)}")
