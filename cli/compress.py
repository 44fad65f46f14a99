"""`lowrank compress`: factorize the matrices of a checkpoint to a target size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import AmountType, device_option, json_option, output_option, seed_option, verbosity_options
from .output import check_new_folder, emit


@click.command("compress")
@click.argument("model")
@click.option("--keep", type=float, default=None, help="Budget: fraction of the numbers to keep, 0 < keep <= 1.")
@click.option("--params", type=AmountType("numbers"), default=None, help="Budget: most numbers, as 1.2B or 300M.")
@click.option("--size", type=AmountType("bytes"), default=None, help="Budget: most bytes, as 120MB or 1.2GiB.")
@click.option(
    "--scope",
    type=click.Choice(["matrices", "model"]),
    default=None,
    help="What the budget is of; by default the matrices for --keep, the model for --params and --size.",
)
@click.option("--objective", metavar="NAME", default="whiten", show_default=True, help="plain or whiten.")
@click.option(
    "--allocation",
    metavar="NAME",
    default="uniform",
    show_default=True,
    help="In which order ranks are bought: uniform, erank, lagrange or loss.",
)
@click.option("--align", type=int, default=None, help="What ranks are multiples of.  [default: up to 16, by the shape]")
@click.option("--form", metavar="NAME", default="factors", show_default=True, help="Of storage: factors or pivoted.")
@click.option("--text", metavar="SOURCE", default=None, help="Calibration: file, folder, hub:NAME[:split] or stdlib.")
@click.option("--calibration-blocks", type=int, default=128, show_default=True, help="Sequences of calibration text.")
@click.option("--check-blocks", type=int, default=32, show_default=True, help="Sequences apart, to measure errors on.")
@click.option("--block-tokens", type=int, default=256, show_default=True, help="Tokens in a sequence.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Sequences in a forward pass.")
@click.option("--max-bytes", type=int, default=None, help="Most bytes of text to take.")
@click.option("--max-shard-bytes", type=int, default=5 * 10**9, show_default=True, help="Most bytes of a file.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the calibration run; the weights on disk keep theirs.",
)
@click.option("--dry-run", is_flag=True, default=False, help="Print the plan with exact bytes and write nothing.")
@output_option(required=False)
@seed_option
@device_option
@json_option
@verbosity_options
def command(
    model: str, output: Path | None, dry_run: bool, device: str, dtype: str, as_json: bool, verbosity: int, **given: Any
) -> None:
    """Factorize a model's matrices to a target size.

    Each matrix of MODEL (a folder or a hub name) becomes two thin ones. Exactly one budget: --keep, --params or
    --size; it is never exceeded. The result is a Hugging Face folder that from_pretrained loads after
    `import lowrank_kit`.
    """
    from lowrank_kit.errors import UsageError

    if output is None and not dry_run:
        raise UsageError("no output folder", hint="-o DIR, or --dry-run for the plan alone")
    from lowrank_kit.compression.settings import CompressSettings

    settings = CompressSettings(**given)
    if dry_run:
        from lowrank_kit.checkpoint.folder import Checkpoint
        from lowrank_kit.compression.evidence import weight_evidence
        from lowrank_kit.compression.plan import evidence_needed, make_plan

        checkpoint = Checkpoint.open(model)
        evidence = weight_evidence(checkpoint) if evidence_needed(checkpoint, settings) == "weights" else None
        plan = make_plan(checkpoint, settings, evidence)
        rows = [matrix.row() for matrix in plan.matrices]
        emit({"totals": plan.totals(), "matrices": rows}, _plan_text(plan.totals(), rows), as_json)
        return
    assert output is not None
    check_new_folder(output)
    from lowrank_kit.compression.run import compress

    report = compress(model, output, settings, device=device, dtype=dtype)
    emit(report, _report_text(report, output), as_json)


def _plan_text(totals: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    from lowrank_kit.report.tables import text_table

    columns = ["matrix", "role", "out", "in", "rank", "form", "kept", "note"]
    return f"{text_table(rows, columns)}\n\n{_size_text(totals)}\nnothing written (--dry-run)"


def _report_text(report: dict[str, Any], output: Path) -> str:
    from lowrank_kit.compression.record import role_rows
    from lowrank_kit.report.tables import text_table

    return f"{text_table(role_rows(report['matrices']))}\n\n{_size_text(report['totals'])}\nwrote {output}"


def _size_text(totals: dict[str, Any]) -> str:
    from lowrank_kit.compression.record import size_rows
    from lowrank_kit.report.tables import text_table

    sizes = text_table(size_rows(totals))
    return f"{sizes}\n\n{totals['factorized']} of {totals['matrices']} matrices factorized"
