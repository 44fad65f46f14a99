"""`lowrank compress`: factorize the matrices of a checkpoint to a target size."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .names import ALLOCATIONS, FORMS, MODEL, OBJECTIVES, REFINES, SOURCE, OfferedType
from .options import (
    AmountType,
    DurationType,
    device_option,
    given_parameters,
    json_option,
    output_option,
    seed_option,
    verbosity_options,
)
from .output import check_new_folder, emit

if TYPE_CHECKING:
    from lowrank_kit.compression.settings import CompressSettings


@click.command("compress")
@click.argument("model", type=MODEL)
@click.option("--keep", type=float, default=None, help="Budget: fraction of the numbers to keep, 0 < keep <= 1.")
@click.option("--params", type=AmountType("numbers"), default=None, help="Budget: most numbers, as 1.2B or 300M.")
@click.option("--size", type=AmountType("bytes"), default=None, help="Budget: most bytes, as 120MB or 1.2GiB.")
@click.option(
    "--scope",
    type=click.Choice(["matrices", "model"]),
    default=None,
    help="What the budget is of; by default the matrices for --keep, the model for --params and --size.",
)
@click.option(
    "--objective",
    type=OfferedType(*OBJECTIVES),
    metavar="NAME",
    default="auto",
    show_default=True,
    help="What factors minimize: plain, scaled, whiten, anchored, two-sided, anchored-two-sided; auto chooses.",
)
@click.option(
    "--allocation",
    type=OfferedType(*ALLOCATIONS),
    metavar="NAME",
    default=None,
    help="Order in which ranks are bought: uniform, erank, lagrange or loss.  [default: auto's, else uniform]",
)
@click.option(
    "--form",
    type=OfferedType(*FORMS),
    metavar="NAME",
    default=None,
    help="Of storage: factors, pivoted, auto for the better one.  [default: auto's, else factors]",
)
@click.option(
    "--refine",
    type=OfferedType(*REFINES),
    metavar="NAME",
    default=None,
    help="Train against the dense model: none, block, e2e, both.  [default: auto's, else none]",
)
@click.option("--include", metavar="PATTERN", multiple=True, help="Matrices by name, once or more often: see below.")
@click.option("--exclude", metavar="PATTERN", multiple=True, help="Matrices that stay dense, once or more often.")
@click.option("--recipe", type=click.Path(path_type=Path), default=None, help="Settings from YAML; options win.")
@click.option("--time", type=DurationType(), default=None, help="What auto may plan for.  [default: 30m]")
@click.option("--align", type=int, default=None, help="What ranks are multiples of.  [default: up to 16, by the shape]")
@click.option(
    "--blend", type=float, default=1.0, show_default=True, help="Of anchored: 0 keeps the map, 1 the outputs."
)
@click.option(
    "--text", type=SOURCE, metavar="SOURCE", default=None, help="Calibration: file, folder, hub:NAME[:split] or stdlib."
)
@click.option("--calibration-blocks", type=int, default=128, show_default=True, help="Sequences of calibration text.")
@click.option("--check-blocks", type=int, default=16, show_default=True, help="Sequences apart, to measure errors on.")
@click.option("--refine-blocks", type=int, default=512, show_default=True, help="Sequences apart, to refine on.")
@click.option("--block-epochs", type=int, default=2, show_default=True, help="Passes over them, by block.")
@click.option("--block-rate", type=float, default=0.05, show_default=True, help="Learning rate / size of a tensor.")
@click.option("--e2e-epochs", type=int, default=2, show_default=True, help="Passes over them, end to end.")
@click.option("--e2e-rate", type=float, default=0.01, show_default=True, help="Learning rate / size of a tensor.")
@click.option("--block-tokens", type=int, default=None, help="Tokens in a sequence.  [default: 256, or the context]")
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
@click.option(
    "--spill",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Folder for hidden states on their way through the blocks, instead of memory.",
)
@click.option("--resume", is_flag=True, default=False, help="Go on with what an earlier run has left beside DIR.")
@click.option("--dry-run", is_flag=True, default=False, help="Print the plan with exact bytes and write nothing.")
@output_option(required=False)
@seed_option
@device_option
@json_option
@verbosity_options
@click.pass_context
def command(
    context: click.Context,
    model: str,
    output: Path | None,
    recipe: Path | None,
    spill: Path | None,
    resume: bool,
    dry_run: bool,
    device: str,
    dtype: str,
    as_json: bool,
    verbosity: int,
    **given: Any,
) -> None:
    """Factorize a model's matrices to a target size.

    Each matrix of MODEL (a folder or a hub name) becomes two thin ones. Exactly one budget: --keep, --params or
    --size; it is never exceeded. How is chosen by the time allowed, or said by --objective, --allocation, --form and
    --refine; text is drawn in disjoint parts to calibrate, to refine and to check. The result is a Hugging Face
    folder that from_pretrained loads after `import lowrank_kit`.

    The model is read block by block. What is finished is kept in DIR.partial until the output is whole: a run that was
    stopped, in whatever way, goes on with --resume and the same settings.

    On several devices: torchrun --nproc-per-node 2 --no-python lowrank compress ..., or accelerate launch. Each process
    has its share of the text and of the matrices, and its own device.

    A PATTERN is of names of matrices as in a shell, "*.o_proj"; with --include what is not named stays dense. The
    budget counts these too. --include lm_head, the head's own name, makes a head that is not tied a matrix like others.

    A recipe holds settings by name (keep: 0.6, calibration_blocks: 64, ...), and under keeps what is kept of some
    matrices, the first that takes one: {role: down, keep: 0.4}, {block: 0, keep: 1.0}, {blocks: 28-31, keep: 0.8},
    {match: "*.k_proj", keep: 0.9}. The budget is that of all: the others share what these leave.
    """
    from lowrank_kit.errors import UsageError

    if output is None and not dry_run:
        raise UsageError("no output folder", hint="-o DIR, or --dry-run for the plan alone")
    settings = _settings(recipe, given, context)
    if dry_run:
        from lowrank_kit.checkpoint.folder import Checkpoint
        from lowrank_kit.compression.preview import preview
        from lowrank_kit.device import resolve_device, resolve_dtype

        where, number = resolve_device(device), resolve_dtype(dtype)
        found = preview(Checkpoint.open_headers(model), settings, where, dtype=number, output=output, spill=spill)
        emit(found, _plan_text(found, verbosity), as_json)
        return
    assert output is not None
    from lowrank_kit.processes import disconnect, is_first

    if not resume and is_first():  # which fills it while the others start
        check_new_folder(output)
    from lowrank_kit.compression.run import compress

    report = compress(model, output, settings, device=device, dtype=dtype, resume=resume, spill=spill)
    disconnect()
    if is_first():
        emit(report, _report_text(report, output), as_json)


def _settings(recipe: Path | None, given: dict[str, Any], context: click.Context) -> CompressSettings:
    from lowrank_kit.compression.settings import BUDGETS, CompressSettings
    from lowrank_kit.config import load_settings

    if recipe is None:
        return CompressSettings(**given)
    written = {name: value for name, value in given_parameters(context).items() if name in given}
    return load_settings(CompressSettings, recipe, written, one_of=BUDGETS)


def _plan_text(found: dict[str, Any], verbosity: int) -> str:
    from lowrank_kit.compression.preview import MANY_BLOCKS, plan_rows
    from lowrank_kit.report.tables import duration, text_table

    many = len({m["block"] for m in found["matrices"]}) >= MANY_BLOCKS and verbosity < 1
    parts = [text_table(plan_rows(found["matrices"], grouped=many)), _size_text(found["totals"])]
    stages = [
        {"stage": name, "tokens": int(stage["tokens"]) or None, "time": duration(stage["seconds"])}
        for name, stage in found["choice"]["stages"].items()
    ]
    parts += [text_table(stages), _needs_text(found["needs"], found["time_class"])]
    parts += ["\n".join(filter(None, [*found["choice"]["reasons"], found["note"]]))]
    parts += [_forecast_text(found["forecast"]), "nothing written (--dry-run)"]
    return "\n\n".join(part for part in parts if part)


def _needs_text(needs: dict[str, Any], time_class: str) -> str:
    from lowrank_kit.report.tables import amount, text_table

    columns = ("weights", "grams", "streams", "workspace", "training", "total")
    rows = []
    for sizes, run in groupby(needs["sections"], key=itemgetter(*columns)):
        names = [section["section"] for section in run]
        whole = " to ".join(dict.fromkeys((names[0], names[-1])))
        rows.append({"memory of": whole, **dict(zip(columns, map(amount, sizes), strict=True))})
    disk = ", ".join(f"{name} {amount(nbytes)}" for name, nbytes in needs["disk"].items() if nbytes and name != "total")
    lines = [f"memory: {amount(needs['memory'])} at the peak, estimated"]
    lines[0] += f", in training end to end {amount(needs['end_to_end'])}" * bool(needs["end_to_end"])
    lines += [f"disk: {amount(needs['disk']['total'])} ({disk})", f"time: {time_class}"]
    return "\n".join([text_table(rows), "", *lines, *(f"may not fit: {warning}" for warning in needs["warnings"])])


def _forecast_text(forecast: dict[str, Any] | None) -> str:
    if forecast is None:
        return ""
    return "forecast: loss +{nats:.3g} nats per token, within a factor of {factor:g}, from {from}".format(**forecast)


def _report_text(report: dict[str, Any], output: Path) -> str:
    from lowrank_kit.compression.record import role_rows
    from lowrank_kit.report.tables import text_table

    parts = [text_table(role_rows(report["matrices"])), _size_text(report["totals"])]
    parts += ["\n".join(report["choice"]["reasons"]), _forecast_text(report["forecast"])]
    if (check := report["check"]) is not None:
        parts.append(
            "loss on check text: {loss_dense:.4f} dense, {loss_compressed:.4f} compressed (+{increase:.3g})".format(
                **check, increase=check["loss_compressed"] - check["loss_dense"]
            )
        )
    return "\n\n".join(part for part in [*parts, f"wrote {output}"] if part)


def _size_text(totals: dict[str, Any]) -> str:
    from lowrank_kit.compression.record import size_rows
    from lowrank_kit.report.tables import text_table

    sizes = text_table(size_rows(totals))
    return f"{sizes}\n\n{totals['factorized']} of {totals['matrices']} matrices factorized"
