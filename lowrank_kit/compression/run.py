"""One compression: a dense folder and a plan in, a compressed folder out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_kit.checkpoint.card import compressed_card
from lowrank_kit.checkpoint.folder import CONFIG_FILE, Checkpoint
from lowrank_kit.checkpoint.quantizer import FORMAT_VERSION, QUANT_METHOD
from lowrank_kit.checkpoint.writer import Shard, write_shards
from lowrank_kit.compression.objectives import OBJECTIVES
from lowrank_kit.compression.plan import Plan, PlannedMatrix, factor_names, make_plan, output_name
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.statistics import input_grams
from lowrank_kit.data.blocks import TokenBlocks, token_blocks
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.device import resolve_device
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import new_folder, write_json, write_text

REPORT_FILE = "compression.json"
# Files of a model folder that are not made anew: tokenizer, generation settings, chat template.
COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja")
NOT_COPIED = (CONFIG_FILE, REPORT_FILE, "run.json", "model.safetensors.index.json")


def compress(
    model: str | Path, output: str | Path, settings: CompressSettings, *, device: str = "auto", dtype: str = "float32"
) -> dict[str, Any]:
    """Factorize the matrices of a checkpoint and write the compressed folder.

    Args:
        model: a folder, or the name of a model on the hub; dense.
        output: folder to make; appears whole or not at all.
        settings: see `CompressSettings`.
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
        calibration = _calibrate(plan, device, dtype) if _needs_grams(plan) else None
        errors: dict[str, float] = {}
        write_shards(folder, list(plan.shards), _filler(plan, calibration.grams if calibration else {}, errors))
        report = _report(plan, str(model), calibration, errors)
        _write_documents(folder, plan, report)
    return report


@dataclass(frozen=True)
class Calibration:
    """Grams of the inputs on calibration text.

    Args:
        blocks: the text.
        grams: `Matrix.shares_input` -> Gram.
        source: name of the text source.
    """

    blocks: TokenBlocks
    grams: dict[str, Tensor]
    source: str


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


def _calibrate(plan: Plan, device: str, dtype: str) -> Calibration:
    settings, path = plan.settings, plan.checkpoint.path
    corpus = load_corpus(settings.text)
    blocks = token_blocks(
        corpus.train,
        AutoTokenizer.from_pretrained(path),
        settings.block_tokens,
        max_blocks=settings.calibration_blocks,
        seed=settings.seed,
    )
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(resolve_device(device))
    largest = int(blocks.ids.max())
    if largest >= model.get_input_embeddings().num_embeddings:
        raise UsageError(
            f"{path}: the tokenizer gives token {largest}, the model has "
            f"{model.get_input_embeddings().num_embeddings} embeddings",
            hint="the tokenizer in the folder is not this model's",
        )
    matrices = [m.stored.matrix for m in plan.matrices if m.rank is not None]
    grams = input_grams(model, matrices, blocks, batch_size=settings.batch_size)
    return Calibration(blocks, grams, corpus.source)


def _filler(plan: Plan, grams: dict[str, Tensor], errors: dict[str, float]) -> Callable[[Shard], dict[str, Tensor]]:
    """Gives the tensors of a shard, read from the source one at a time; notes the error of each matrix."""
    factorize = OBJECTIVES[plan.settings.objective].factorize
    factorized = {m.stored.tensors[0]: m for m in plan.matrices if m.rank is not None}
    bar = tqdm(total=len(factorized), desc="factorize", unit="matrix", disable=None)

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
    cut = factors.truncate(planned.rank)
    A, B, sentinel = factor_names(planned.stored)
    dtype = tensor.dtype
    return {A: cut.A.to(dtype), B: cut.B.to(dtype), sentinel: torch.zeros(1, dtype=dtype)}


def _report(plan: Plan, model: str, calibration: Calibration | None, errors: dict[str, float]) -> dict[str, Any]:
    text = None
    if calibration is not None:
        blocks = calibration.blocks
        text = {"source": calibration.source, "sha256": blocks.sha256, "tokens": blocks.num_tokens}
    return {
        "model": model,
        "settings": asdict(plan.settings),
        "totals": plan.totals(),
        "calibration": text,
        "matrices": [{**m.row(), "relative_error": errors.get(m.stored.matrix.name)} for m in plan.matrices],
        "environment": environment(),
    }


def _write_documents(folder: Path, plan: Plan, report: dict[str, Any]) -> None:
    """Config, report and model card, and what is copied from the source."""
    source = plan.checkpoint.path
    for file in source.iterdir():
        if file.is_file() and file.suffix in COPIED_SUFFIXES and file.name not in NOT_COPIED:
            shutil.copyfile(file, folder / file.name)
    config = dict(plan.checkpoint.config)
    if matrices := plan.quantization_config():
        config["quantization_config"] = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "matrices": matrices,
        }
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    write_json(folder / REPORT_FILE, report)
    settings = plan.settings
    how = {
        "keep": f"{settings.keep:g} of the numbers of the matrices",
        "objective": f"{settings.objective} ({OBJECTIVES[settings.objective].title})",
        "allocation": settings.allocation,
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
