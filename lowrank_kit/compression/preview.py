"""What a compression would do, told without doing it: `--dry-run`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.allocation import Evidence
from lowrank_kit.compression.auto import SPECTRA_SECONDS, choose, spectra_seconds
from lowrank_kit.compression.evidence import weight_evidence
from lowrank_kit.compression.forecast import forecast
from lowrank_kit.compression.plan import evidence_needed, make_plan
from lowrank_kit.compression.settings import CompressSettings

BY_UNIFORM = "ranks as uniform would have them: {allocation} decides by {what}, within the same budget"


def preview(checkpoint: Checkpoint, settings: CompressSettings, device: torch.device) -> dict[str, Any]:
    """Plan, choice and forecast; no text is read, and weights only where their spectra are asked for.

    Args:
        checkpoint: of the dense model.
        settings: as for `compress`.
        device: where it would run.

    Returns:
        totals, matrices (one row each), choice, forecast, and a note where the ranks are not the final ones.

    Raises:
        UsageError: the checkpoint is compressed already, or has no matrix.
        DoesNotFitError: a budget below the smallest possible.
    """
    choice = choose(checkpoint, settings, device)
    needed = evidence_needed(checkpoint, choice.settings)
    open_still = {"inputs": "the calibration text", "loss": "the calibration text"}
    if not checkpoint.has_weights:
        open_still["weights"] = "the weights, which are not downloaded"
    shown = replace(choice.settings, allocation="uniform") if needed in open_still else choice.settings
    evidence = _evidence(checkpoint, needed, device) if checkpoint.has_weights else None
    plan = make_plan(checkpoint, shown, evidence)
    return {
        "totals": plan.totals(),
        "matrices": [matrix.row() for matrix in plan.matrices],
        "choice": choice.record(),
        "forecast": forecast(plan.matrices, evidence, choice.settings.refine or "none"),
        "note": BY_UNIFORM.format(allocation=choice.settings.allocation, what=open_still[needed])
        if needed in open_still
        else None,
    }


def _evidence(checkpoint: Checkpoint, needed: str, device: torch.device) -> dict[str, Evidence] | None:
    if needed == "weights" or spectra_seconds(checkpoint, device) <= SPECTRA_SECONDS:
        return weight_evidence(checkpoint)
    return None
