"""One compression: a dense folder and a plan in, a compressed folder out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from lowrank_kit.checkpoint.card import compressed_card
from lowrank_kit.checkpoint.folder import CONFIG_FILE, REPORT_FILE, Checkpoint
from lowrank_kit.checkpoint.loading import check_blocks, load_model, load_tokenizer
from lowrank_kit.checkpoint.quantizer import QUANT_METHOD, needed_version
from lowrank_kit.checkpoint.writer import Shard, write_shards
from lowrank_kit.compression.forms import FORMS
from lowrank_kit.compression.objectives import OBJECTIVES
from lowrank_kit.compression.plan import Plan, PlannedMatrix, make_plan, output_name, planned_tensors
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.statistics import input_grams
from lowrank_kit.compression.texts import Texts, draw_texts
from lowrank_kit.device import resolve_device, resolve_dtype
from lowrank_kit.errors import LowRankError
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import new_folder, write_json, write_text

# Files of a model folder that are not made anew: tokenizer, generation settings, chat template.
COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja")
NOT_COPIED = (CONFIG_FILE, REPORT_FILE, "run.json")
# Indices of the source's shards, in whatever format.
INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True)
class Calibration:
    """Grams of the inputs of a model on calibration text; serves any keep.

    Args:
        model: folder of the model.
        texts: the text, and what was drawn apart from it.
        grams: `Matrix.shares_input` -> Gram.
    """

    model: Path
    texts: Texts
    grams: dict[str, Tensor]


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
        calibration: from `calibrate` with this model; None runs it if the objective asks for it.
        device: where the calibration text is run.
        dtype: number format of the calibration run; the weights on disk keep theirs.

    Returns:
        The contents of compression.json.

    Raises:
        UsageError: no such model, not a dense causal LM, an output that is not empty, too little text.
        LowRankError: a broken shard, NaN or Inf in a matrix or an activation.
    """
    checkpoint = Checkpoint.open(model)
    plan = make_plan(checkpoint, settings)
    with new_folder(output) as folder:
        _refuse_non_finite(checkpoint)
        if not _needs_grams(plan):
            calibration = None
        elif calibration is None:
            calibration = calibrate(checkpoint, settings, device=device, dtype=dtype)
        elif calibration.model != checkpoint.path:
            raise ValueError(f"the calibration is of {calibration.model}, not of {checkpoint.path}")
        errors: dict[str, float] = {}
        num_factorized = sum(m.rank is not None for m in plan.matrices)
        with tqdm(total=num_factorized, desc="factorize", unit="matrix", disable=None) as bar:
            fill = _filler(plan, calibration.grams if calibration else {}, errors, bar)
            write_shards(folder, list(plan.shards), fill)
        report = _report(plan, str(model), calibration, errors)
        _write_documents(folder, plan, report)
    return report


def calibrate(
    checkpoint: Checkpoint, settings: CompressSettings, *, device: str = "auto", dtype: str = "float32"
) -> Calibration:
    """Run the calibration text through the dense model once.

    Args:
        checkpoint: of the dense model.
        settings: the text, how much of it, and the seed; keep does not matter.
        device: where to run.
        dtype: number format of the run.

    Raises:
        UsageError: too little text, or a tokenizer that is not the model's.
        LowRankError: NaN or Inf in an activation.
    """
    torch_device, torch_dtype = resolve_device(device), resolve_dtype(dtype)
    tokenizer = load_tokenizer(checkpoint.path)
    texts = draw_texts(
        settings.text,
        tokenizer,
        block_tokens=settings.block_tokens,
        calibration=settings.calibration_blocks,
        check=settings.check_blocks,
        max_bytes=settings.max_bytes,
        seed=settings.seed,
    )
    model = load_model(checkpoint, device=torch_device, dtype=torch_dtype)
    for blocks in texts.sets.values():
        check_blocks(model, blocks)
    matrices = [stored.matrix for stored in checkpoint.matrices() if stored.matrix.expert is None]
    grams = input_grams(model, matrices, texts.calibration, batch_size=settings.batch_size)
    return Calibration(checkpoint.path, texts, grams)


def _needs_grams(plan: Plan) -> bool:
    return OBJECTIVES[plan.settings.objective].needs_gram and any(m.rank is not None for m in plan.matrices)


def _refuse_non_finite(checkpoint: Checkpoint) -> None:
    """Read every tensor once: a NaN would otherwise show as a NaN activation somewhere else."""
    for name, tensor in checkpoint.tensors():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise LowRankError(
                f"{checkpoint.path}: NaN or Inf in {name}: {count:,} of {tensor.numel():,} numbers",
                hint="train or download the model again; nothing was written",
            )


def _filler(
    plan: Plan, grams: dict[str, Tensor], errors: dict[str, float], bar: tqdm[Any]
) -> Callable[[Shard], dict[str, Tensor]]:
    """Gives the tensors of a shard, read from the source one at a time; notes the error of each matrix."""
    factorize = OBJECTIVES[plan.settings.objective].factorize
    factorized = {m.stored.tensors[0]: m for m in plan.matrices if m.rank is not None}

    def fill(shard: Shard) -> dict[str, Tensor]:
        wanted = {h.name for h in shard.headers}
        # The sentinel has the name of the matrix it stands for.
        sources = [name for name in plan.checkpoint.headers if output_name(name, factorized) in wanted]
        filled: dict[str, Tensor] = {}
        for name, tensor in plan.checkpoint.tensors(sources):
            if name in factorized:
                filled |= _factors(factorized[name], tensor, grams, factorize, errors)
                bar.update()
            else:
                filled[output_name(name, factorized)] = tensor
        return filled

    return fill


def _factors(
    planned: PlannedMatrix, tensor: Tensor, grams: dict[str, Tensor], factorize: Any, errors: dict[str, float]
) -> dict[str, Tensor]:
    assert planned.rank is not None
    matrix = planned.stored.matrix
    factors = factorize(planned.stored.weight(tensor), grams.get(matrix.shares_input))
    errors[matrix.name] = factors.relative_error(planned.rank)
    names = [name for name, _, _ in planned_tensors(planned, "F32")]
    return dict(zip(names, FORMS[planned.form].stored(factors.truncate(planned.rank), tensor.dtype), strict=True))


def _report(plan: Plan, model: str, calibration: Calibration | None, errors: dict[str, float]) -> dict[str, Any]:
    return {
        "model": model,
        "settings": asdict(plan.settings),
        "totals": plan.totals(),
        "calibration": calibration and calibration.texts.record(),
        "matrices": [{**m.row(), "relative_error": errors.get(m.stored.matrix.name)} for m in plan.matrices],
        "environment": environment(),
    }


def _write_documents(folder: Path, plan: Plan, report: dict[str, Any]) -> None:
    """Config, report and model card, and what is copied from the source."""
    source = plan.checkpoint.path
    for file in source.iterdir():
        wanted = file.suffix in COPIED_SUFFIXES and file.name not in NOT_COPIED
        if wanted and file.is_file() and not file.name.endswith(INDEX_SUFFIX):
            shutil.copyfile(file, folder / file.name)
    config = dict(plan.checkpoint.config)
    if matrices := plan.quantization_config():
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format_version": needed_version(matrices),
            "matrices": matrices,
        }
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    write_json(folder / REPORT_FILE, report)
    settings = plan.settings
    how = {
        "keep": f"{settings.keep:g} of the numbers of the matrices",
        "objective": f"{settings.objective} ({OBJECTIVES[settings.objective].title})",
        "allocation": settings.allocation,
        "form": f"{settings.form} ({FORMS[settings.form].title})",
        "calibration": report["calibration"]
        and "{source}, {tokens:,} tokens, sha256 {sha256}".format(**report["calibration"]),
        "seed": settings.seed,
        "lowrank-kit": report["environment"].get("lowrank-kit"),
    }
    card = compressed_card(
        base_model=Path(report["model"]).name if Path(report["model"]).is_dir() else report["model"],
        summary=size_rows(plan.totals()),
        matrices=role_rows(report["matrices"]),
        how=how,
    )
    write_text(folder / "README.md", card)


def size_rows(totals: dict[str, Any]) -> list[dict[str, Any]]:
    """Kept and removed of the matrices and of the whole model, in numbers; of the files in bytes."""
    pairs = {
        "matrices (numbers)": ("matrix_numbers_before", "matrix_numbers_after"),
        "model (numbers)": ("model_numbers_before", "model_numbers_after"),
        "files (bytes)": ("bytes_before", "bytes_after"),
    }
    return [
        {
            "": name,
            "dense": totals[before],
            "compressed": totals[after],
            "kept %": round(100 * totals[after] / totals[before], 1),
            "removed %": round(100 - 100 * totals[after] / totals[before], 1),
        }
        for name, (before, after) in pairs.items()
    ]


def role_rows(matrices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per role: how many, shape, lowest and highest rank, mean error, and why some stay dense."""
    rows = []
    for role in dict.fromkeys(m["role"] for m in matrices):
        here = [m for m in matrices if m["role"] == role]
        ranks = sorted({m["rank"] for m in here if m["rank"] is not None})
        errors = [m["relative_error"] for m in here if m.get("relative_error") is not None]
        rows.append(
            {
                "role": role,
                "matrices": len(here),
                "out x in": ", ".join(dict.fromkeys(f"{m['out']} x {m['in']}" for m in here)),
                "rank": "-".join(dict.fromkeys(str(rank) for rank in (ranks[:1] + ranks[-1:]))) or None,
                "dense": sum(m["rank"] is None for m in here),
                "error": sum(errors) / len(errors) if errors else None,
                "note": "; ".join(dict.fromkeys(m["note"] for m in here if m["note"])),
            }
        )
    return rows
