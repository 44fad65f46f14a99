"""`lowrank export`: a model in a form that other tools take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lowrank_kit.serving.exports import KINDS, check_kind

from .names import MODEL, OfferedType
from .options import device_option, dtype_option, json_option, output_option, verbosity_options
from .output import check_new_folder, emit


def _kind(context: click.Context, parameter: click.Parameter, value: str) -> str:
    return check_kind(value)


@click.command("export")
@click.argument("model", type=MODEL)
@click.option(
    "--to",
    type=OfferedType(*KINDS),
    metavar="KIND",
    required=True,
    callback=_kind,
    help="; ".join(f"{name}: {title}" for name, title in KINDS.items()) + ".",
)
@click.option(
    "--base", type=MODEL, metavar="MODEL", default=None, help="Dense model that adapters are for (--to lora)."
)
@click.option("--rank", type=int, default=None, help="Of adapters (--to lora).  [default: 16]")
@click.option(
    "--max-shard-bytes", type=click.IntRange(1), default=5 * 10**9, show_default=True, help="Most bytes of a file."
)
@output_option()
@device_option
@dtype_option
@json_option
@verbosity_options
def command(model: str, output: Path, device: str, as_json: bool, verbosity: int, **given: Any) -> None:
    """Write a model in a form that other tools take.

    MODEL is a folder or a hub name. With --to dense the factors of a compressed model are multiplied, one matrix at a
    time: the files grow again, to a plain folder that needs no lowrank-kit. --to lora takes a dense model too, and
    --to onnx any.
    """
    check_new_folder(output)
    from lowrank_kit.serving.export import export
    from lowrank_kit.serving.exports.base import ExportSettings

    document = export(model, output, ExportSettings(**given), device=device, progress=verbosity >= 0)
    emit(document, export_text(document, output), as_json)


def export_text(document: Mapping[str, Any], output: Path) -> str:
    """The matrices by role, notes, and what was written."""
    from lowrank_kit.report.tables import amount, text_table

    lines = [text_table(_role_rows(document["matrices"])), ""] if document["matrices"] else []
    written = amount(document["result"]["bytes_after"])
    return "\n".join([*lines, *document["notes"], f"wrote {output}, weights of {written}"])


def _role_rows(matrices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for role in dict.fromkeys(m["role"] for m in matrices):
        here = [m for m in matrices if m["role"] == role]
        ranks = sorted({m["rank"] for m in here})
        row = {
            "role": role,
            "matrices": len(here),
            "out x in": ", ".join(dict.fromkeys(f"{m['out']} x {m['in']}" for m in here)),
            "rank": "-".join(dict.fromkeys(str(rank) for rank in (ranks[0], ranks[-1]))),
        }
        errors = [m["relative_error"] for m in here if "relative_error" in m]
        rows.append(row | ({"error": sum(errors) / len(errors)} if errors else {}))
    return rows
