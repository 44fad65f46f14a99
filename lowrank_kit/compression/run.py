"""One compression: a dense folder and settings in, a compressed folder out."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_kit.checkpoint.folder import CONFIG_FILE, REPORT_FILE, Checkpoint
from lowrank_kit.checkpoint.loading import load_model
from lowrank_kit.checkpoint.writer import Shard, write_shards
from lowrank_kit.compression.allocation import Evidence
from lowrank_kit.compression.auto import Choice, choose
from lowrank_kit.compression.calibration import (
    Calibration,
    calibrate,
    inputs_evidence,
    loss_evidence,
)
from lowrank_kit.compression.evidence import refuse_non_finite, weight_evidence
from lowrank_kit.compression.fold import Folded, fold
from lowrank_kit.compression.forecast import forecast
from lowrank_kit.compression.objectives import OBJECTIVES
from lowrank_kit.compression.piece import TORCH_DTYPES
from lowrank_kit.compression.plan import Plan, PlannedMatrix, evidence_needed, make_plan, output_name
from lowrank_kit.compression.record import make_report, write_documents
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.statistics import mean_loss
from lowrank_kit.device import resolve_device, resolve_dtype
from lowrank_kit.linalg.factor import weighted_error
from lowrank_kit.report.files import new_folder
from lowrank_kit.report.tables import duration

logger = logging.getLogger(__name__)

# Files of a model folder that are not made anew: tokenizer, generation settings, chat template.
COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja")
NOT_COPIED = (CONFIG_FILE, REPORT_FILE, "run.json")
# Indices of the source's shards, in whatever format.
INDEX_SUFFIX = ".index.json"


def compress(
    model: str | Path,
    output: str | Path,
    settings: CompressSettings,
    *,
    calibration: Calibration | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Factorize the matrices of a checkpoint and write the compressed folder.

    Args:
        model: a folder, or the name of a model on the hub; dense.
        output: folder to make; appears whole or not at all.
        settings: see `CompressSettings`.
        calibration: from `calibrate` with this model; None runs it if the settings ask for it.
        device: where the text is run.
        dtype: number format of the runs, but for refinement; the weights on disk keep theirs.

    Returns:
        The contents of compression.json.

    Raises:
        UsageError: no such model, not a dense causal LM, an output that is not empty, too little text.
        DoesNotFitError: a budget below the smallest possible.
        LowRankError: a broken shard, NaN or Inf in a matrix, an activation or a loss.
    """
    checkpoint = Checkpoint.open(model)
    choice = choose(checkpoint, settings, resolve_device(device))
    settings = choice.settings
    needed = evidence_needed(checkpoint, settings)
    _tell(choice)
    with new_folder(output) as folder:
        for name, tensor in checkpoint.tensors():
            refuse_non_finite(checkpoint, name, tensor)
        plan, evidence, calibration = prepare(
            checkpoint, settings, needed, calibration=calibration, device=device, dtype=dtype
        )
        expected = forecast(plan.matrices, evidence, settings.refine or "none")
        if expected is not None:
            logger.info("forecast: +%.3g nats per token, within a factor of %g (%s)", *expected.values())
        folded = fold(plan, calibration, device=resolve_device(device), dtype=resolve_dtype(dtype))
        plan = replace(plan, matrices=tuple(_as_made(m, folded) for m in plan.matrices))
        write_shards(folder, list(plan.shards), _filler(plan, _made(plan, folded)))
        _copy_others(checkpoint.path, folder)
        errors = output_errors(plan, calibration, folded)
        report = make_report(plan, str(model), calibration, folded, errors, device=device, dtype=dtype)
        report |= {"choice": choice.record(), "forecast": expected}
        write_documents(folder, plan, report)
        if calibration is not None:
            report["check"] |= {"loss_compressed": _check_loss(folder, calibration, settings, device, dtype)}
            write_documents(folder, plan, report)
    return report


def _tell(choice: Choice) -> None:
    for reason in choice.reasons:
        logger.info("chosen: %s", reason)
    for name, stage in choice.stages.items():
        if stage["tokens"]:
            logger.info("%s: %s tokens, %s", name, f"{stage['tokens']:,.0f}", duration(stage["seconds"]))


def prepare(
    checkpoint: Checkpoint,
    settings: CompressSettings,
    needed: str,
    *,
    calibration: Calibration | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> tuple[Plan, dict[str, Evidence] | None, Calibration | None]:
    """The plan, the evidence for it, and what has to be known of the model for both and for the factors.

    Args:
        checkpoint: of the dense model.
        settings: with nothing left open.
        needed: of `evidence_needed`.
        calibration, device, dtype: as in `compress`.
    """
    text_wanted = OBJECTIVES[settings.objective].needs_text or needed in ("inputs", "loss") or settings.refine != "none"
    if calibration is not None and calibration.model != checkpoint.path:
        raise ValueError(f"the calibration is of {calibration.model}, not of {checkpoint.path}")
    if calibration is not None and settings.refine != "none" and calibration.texts.refinement is None:
        raise ValueError("the calibration has no refinement text: calibrate with settings that refine")
    if not text_wanted:
        calibration = None
    elif calibration is not None:
        # Its own clock: what another compression took is not to be in this one's report.
        calibration = replace(calibration, seconds=dict(calibration.seconds))
    elif not _all_dense(checkpoint, settings, needed):
        calibration = calibrate(checkpoint, settings, device=device, dtype=dtype)
    evidence = _evidence(checkpoint, settings, needed, calibration)
    return make_plan(checkpoint, settings, evidence), evidence, calibration


def _all_dense(checkpoint: Checkpoint, settings: CompressSettings, needed: str) -> bool:
    """Whether the budget leaves nothing to do."""
    if needed != "nothing":
        return False
    return all(m.rank is None for m in make_plan(checkpoint, replace(settings, allocation="uniform")).matrices)


def _evidence(
    checkpoint: Checkpoint, settings: CompressSettings, needed: str, calibration: Calibration | None
) -> dict[str, Evidence] | None:
    if needed == "nothing":
        return None
    if needed == "weights":
        return weight_evidence(checkpoint)
    assert calibration is not None
    if needed == "inputs":
        return inputs_evidence(calibration, checkpoint)
    return loss_evidence(calibration, checkpoint, settings.objective, settings.options)


def _as_made(planned: PlannedMatrix, folded: Folded) -> PlannedMatrix:
    piece = folded.pieces.get(planned.stored.matrix.name)
    return planned if piece is None else piece.planned


def _made(plan: Plan, folded: Folded) -> dict[str, Tensor]:
    """Name in the output -> tensor, of all that is not as it was."""
    made: dict[str, Tensor] = {}
    for piece in folded.pieces.values():
        made |= piece.named()
    if not folded.others:
        return made
    on_disk = plan.checkpoint.disk_names()
    for name, tensor in folded.others.items():
        owner = name.removesuffix(".bias").removesuffix(".B")
        layer = folded.pieces.get(owner)
        target = on_disk[name] if layer is None else layer.planned.disk_path + name.removeprefix(owner)
        made[target] = tensor
    return made


def _filler(plan: Plan, made: Mapping[str, Tensor]) -> Callable[[Shard], dict[str, Tensor]]:
    """Gives the tensors of a shard: what was made, in the dtype that was planned, and the rest read from the source."""
    factorized = {m.stored.tensors[0]: m for m in plan.matrices if m.rank is not None}
    source_of = {output_name(name, factorized): name for name in plan.checkpoint.headers}

    def fill(shard: Shard) -> dict[str, Tensor]:
        here = {h.name: h for h in shard.headers}
        filled = {
            name: made[name].to(TORCH_DTYPES[h.dtype]) if made[name].is_floating_point() else made[name]
            for name, h in here.items()
            if name in made
        }
        wanted = {source_of[name]: name for name in here if name not in made}
        filled |= {wanted[name]: tensor for name, tensor in plan.checkpoint.tensors(wanted)}
        return filled

    return fill


def output_errors(plan: Plan, calibration: Calibration | None, folded: Folded) -> dict[str, float]:
    """Relative error of the outputs of each factorized matrix on the check text; of its weights without one."""
    stored = {m.stored.tensors[0]: m.stored for m in plan.matrices if m.rank is not None}
    errors = {}
    for name, tensor in plan.checkpoint.tensors(stored):
        matrix = stored[name].matrix
        gram = calibration.check_grams[matrix.shares_input] if calibration is not None else None
        errors[matrix.name] = weighted_error(stored[name].weight(tensor), folded.pieces[matrix.name].dense(), gram)
    return errors


def _copy_others(source: Path, folder: Path) -> None:
    for file in source.iterdir():
        wanted = file.suffix in COPIED_SUFFIXES and file.name not in NOT_COPIED
        if wanted and file.is_file() and not file.name.endswith(INDEX_SUFFIX):
            shutil.copyfile(file, folder / file.name)


def _check_loss(folder: Path, calibration: Calibration, settings: CompressSettings, device: str, dtype: str) -> float:
    """Loss on the check text of what was written, loaded as anybody would."""
    model = load_model(Checkpoint.open(folder), device=resolve_device(device), dtype=resolve_dtype(dtype))
    with torch.inference_mode():
        return mean_loss(model, calibration.texts.check, batch_size=settings.batch_size)
