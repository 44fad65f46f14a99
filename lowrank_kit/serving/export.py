"""One export: a model folder in, a folder for other tools out."""

from __future__ import annotations

import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from lowrank_kit.checkpoint.agreement import agreed
from lowrank_kit.checkpoint.beside import EXPORT_FILE
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.hub import model_name
from lowrank_kit.device import resolve_device, resolve_dtype
from lowrank_kit.errors import UsageError
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import new_folder, write_json, write_text
from lowrank_kit.serving.exports import KINDS, find_kind
from lowrank_kit.serving.exports.base import ExportSettings, Request

logger = logging.getLogger(__name__)

SCHEMA = "lowrank-export/1"


def export(
    model: str | Path,
    output: str | Path,
    settings: ExportSettings | None = None,
    *,
    device: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Write a model in a form that other tools take.

    Args:
        model: a folder or a hub name, compressed or, where the kind takes it, dense.
        output: folder to make; appears whole or not at all.
        settings: kind and what it asks for.
        device: where products and decompositions are computed.
        progress: whether a bar is drawn.

    Returns:
        What export.json in the folder says.

    Raises:
        UsageError: an unknown kind, a setting that is not for it, a package that is not installed, no such model, the
            output is taken.
        LowRankError: damaged files, or config.json and tensors disagree.
    """
    settings = settings or ExportSettings()
    kind = find_kind(settings.to)
    _refuse_foreign(settings, kind.options)
    resolve_dtype(settings.dtype)
    kind.check(settings)
    where = resolve_device(device)
    if where.type == "mps":  # which has no float64
        where = torch.device("cpu")
    with new_folder(output) as folder:
        checkpoint = agreed(Checkpoint.open(model))
        request = Request(
            model=str(model),
            name=model_name(model),
            checkpoint=checkpoint,
            settings=settings,
            device=where,
            progress=progress,
        )
        made = kind.write(request, folder)
        write_text(folder / "README.md", made.card)
        document = {
            "schema": SCHEMA,
            "model": str(model),
            "settings": asdict(settings),
            "result": made.result,
            "notes": made.notes,
            "warnings": made.warnings,
            "matrices": made.matrices,
            "environment": environment(),
        }
        write_json(folder / EXPORT_FILE, document)
    for warning in made.warnings:
        logger.warning("%s", warning)
    return document


def _refuse_foreign(settings: ExportSettings, options: tuple[str, ...]) -> None:
    """Refuse settings that another kind has."""
    optional = {field.name for field in fields(ExportSettings) if field.default is None}
    for name in sorted(optional - set(options)):
        if getattr(settings, name) is not None:
            kinds = [kind for kind in KINDS if name in find_kind(kind).options]
            raise UsageError(
                f"--{name} is not for --to {settings.to}", hint=f"leave it out, or --to {' or '.join(kinds)}"
            )
