"""`lowrank analyze`: the spectrum of every matrix of a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowrank_kit.errors import UsageError

from .names import MODEL
from .options import json_option, output_option, verbosity_options
from .output import check_new_folder, emit

if TYPE_CHECKING:
    from lowrank_kit.spectra.measure import Spectra

HEADINGS = {
    "stable_rank": "stable",
    "effective_rank": "effective",
    "rank_90": "rank 90 %",
    "rank_95": "rank 95 %",
    "rank_99": "rank 99 %",
}


@click.command("analyze")
@click.argument("model", type=MODEL)
@click.option(
    "--against", type=MODEL, metavar="MODEL", default=None, help="A second model with the same matrices, beside it."
)
@click.option("--all", "every", is_flag=True, default=False, help="A row for every matrix instead of every role.")
@output_option(required=False)
@json_option
@verbosity_options
def command(model: str, against: str | None, every: bool, output: Path | None, as_json: bool, verbosity: int) -> None:
    """Measure the singular values of every matrix of a model.

    MODEL is a folder or a hub name, dense or compressed; shards are read one at a time and no model is built. With -o,
    writes spectra.json, spectra.csv, decay.png and heatmap.png.
    """
    if output is not None:
        check_new_folder(output)
    from lowrank_kit.checkpoint.folder import Checkpoint
    from lowrank_kit.report.tables import text_table
    from lowrank_kit.spectra.measure import check_comparable, measure

    models = [model] if against is None else [model, against]
    checkpoints = [Checkpoint.open(name) for name in models]
    names = _short_names(models)
    if against is not None:
        if checkpoints[0].path.resolve() == checkpoints[1].path.resolve():
            raise UsageError(f"{model} and {against} are the same model", hint="give another one with --against")
        check_comparable(*checkpoints)
    found = [measure(checkpoint, progress=verbosity >= 0) for checkpoint in checkpoints]
    tables = [_rows(name, spectra, every) for name, spectra in zip(names, found, strict=True)]
    rows = [row for beside in zip(*tables, strict=True) for row in beside]
    if against is None:
        rows = [{key: value for key, value in row.items() if key != "model"} for row in rows]
    note = "" if every else "\n\nshares of min(out, in), means over the matrices of a role"
    text = text_table(rows) + note
    document: dict[str, Any] = {
        "models": [
            {
                "name": name,
                "model": spectra.model,
                "overall": vars(spectra.overall()),
                "roles": [vars(summary) for summary in spectra.by_role()],
                "matrices": [row.record() for row in spectra.rows],
            }
            for name, spectra in zip(names, found, strict=True)
        ]
    }
    if output is not None:
        from lowrank_kit.spectra.write import write_spectra

        write_spectra(output, dict(zip(names, found, strict=True)), document)
        text += f"\nwrote {output}"
    emit(document, text, as_json)


def _short_names(models: list[str]) -> list[str]:
    """The last parts of the folders or hub names, or all of them where those would be the same."""
    names = [Path(os.path.abspath(model)).name for model in models]  # "." has a name too
    return names if len(set(names)) == len(names) else models


def _rows(name: str, spectra: Spectra, every: bool) -> list[dict[str, Any]]:
    if every:
        return [
            {
                "matrix": row.name,
                "model": name,
                "role": row.role,
                "out": row.shape[0],
                "in": row.shape[1],
                **{heading: getattr(row, measure) for measure, heading in HEADINGS.items()},
                **{f"{heading} / min": row.share(measure) for measure, heading in HEADINGS.items()},
            }
            for row in spectra.rows
        ]
    return [
        {
            "role": summary.role,
            "model": name,
            "matrices": summary.num_matrices,
            **{heading: getattr(summary, f"{measure}_share") for measure, heading in HEADINGS.items()},
        }
        for summary in [*spectra.by_role(), spectra.overall()]
    ]
