"""What a compression would do, told without doing it: `--dry-run`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.allocation import Evidence
from lowrank_kit.compression.auto import SPECTRA_SECONDS, choose, spectra_seconds
from lowrank_kit.compression.evidence import weight_evidence
from lowrank_kit.compression.forecast import forecast
from lowrank_kit.compression.needs import planned_needs
from lowrank_kit.compression.plan import evidence_needed, make_plan
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.targets import targeted
from lowrank_kit.report.tables import amount, time_class

# From so many blocks on the text of a plan groups what is the same.
MANY_BLOCKS = 100
# What stands before the index of a block in a name.
BLOCK = re.compile(r"(^|\.)\d+(?=\.|$)")
BY_UNIFORM = "ranks as uniform would have them: {allocation} decides by {what}, within the same budget"


def preview(
    checkpoint: Checkpoint,
    settings: CompressSettings,
    device: torch.device,
    *,
    dtype: torch.dtype | str = torch.float32,
    output: Path | None = None,
    spill: Path | None = None,
) -> dict[str, Any]:
    """Plan, choice, needs and forecast; no text is read, and weights only where their spectra are asked for.

    Args:
        checkpoint: of the dense model.
        settings: as for `compress`.
        device: where it would run.
        dtype: of the runs.
        output: folder that would be made, whose disk is looked at; None for no look.
        spill: hidden states would be in files.

    Returns:
        totals, matrices (one row each), choice, needs, time_class, forecast, and a note where the ranks are not the
        final ones.

    Raises:
        UsageError: the checkpoint is compressed already, or has no matrix.
        DoesNotFitError: a budget below the smallest possible.
    """
    checkpoint = targeted(checkpoint, settings)
    choice = choose(checkpoint, settings, device)
    needed = evidence_needed(checkpoint, choice.settings)
    open_still = {"inputs": "the calibration text", "loss": "the calibration text"}
    if not checkpoint.has_weights:
        open_still["weights"] = "the weights, which are not downloaded"
    shown = replace(choice.settings, allocation="uniform") if needed in open_still else choice.settings
    evidence = _evidence(checkpoint, needed, device) if checkpoint.has_weights else None
    plan = make_plan(checkpoint, shown, evidence)
    needs = planned_needs(plan, choice.settings, dtype=dtype, spill=spill is not None)
    return {
        "totals": plan.totals(),
        "matrices": [matrix.row() for matrix in plan.matrices],
        "choice": choice.record(),
        "needs": needs.record(device, output, spill),
        "time_class": time_class(choice.seconds),
        "forecast": forecast(plan.matrices, evidence, choice.settings.refine or "none"),
        "note": BY_UNIFORM.format(allocation=choice.settings.allocation, what=open_still[needed])
        if needed in open_still
        else None,
    }


def plan_rows(matrices: Sequence[Mapping[str, Any]], *, grouped: bool = False) -> list[dict[str, Any]]:
    """Rows of the plan for a person, within 120 columns for most models.

    Args:
        matrices: rows of `preview`.
        grouped: those that are the same in neighbouring blocks are one row, as "layers.0-31.mlp.up_proj".
    """
    rows = [
        {
            "matrix": m["matrix"],
            "role": m["role"],
            "out x in": " x ".join(str(m[side]) for side in ("experts", "out", "in") if m.get(side)),
            "rank": m["rank"],
            "form": m["form"],
            "kept": m["kept"],
            "before": amount(m["bytes_before"]),
            "after": amount(m["bytes_after"]),
            "note": m["note"],
        }
        for m in matrices
    ]
    return _grouped(rows, [m["block"] for m in matrices]) if grouped else rows


def _grouped(rows: list[dict[str, Any]], blocks: list[int | None]) -> list[dict[str, Any]]:
    """Runs of blocks in which a row is the same but for the block; each where its first block is."""
    runs: dict[tuple[Any, ...], list[tuple[dict[str, Any], list[int]]]] = {}
    found: list[tuple[dict[str, Any], list[int]]] = []
    for row, block in zip(rows, blocks, strict=True):
        name = row["matrix"] if block is None else BLOCK.sub(r"\1{}", row["matrix"], count=1)
        here = runs.setdefault((name, *list(row.values())[1:]), [])
        if block is not None and here and here[-1][1][-1] == block - 1:
            here[-1][1].append(block)
            continue
        here.append(({**row, "matrix": name}, [] if block is None else [block]))
        found.append(here[-1])
    spans = ("-".join(dict.fromkeys(map(str, run[:1] + run[-1:]))) for _, run in found)
    return [
        {**row, "matrix": row["matrix"].replace("{}", span, 1)} for (row, _), span in zip(found, spans, strict=True)
    ]


def _evidence(checkpoint: Checkpoint, needed: str, device: torch.device) -> dict[str, Evidence] | None:
    if needed == "weights" or spectra_seconds(checkpoint, device) <= SPECTRA_SECONDS:
        return weight_evidence(checkpoint)
    return None
