"""`lowrank analyze`: the spectrum of every matrix of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import json_option, output_option, verbosity_options
from .output import check_new_folder, emit

if TYPE_CHECKING:
    from lowrank_kit.spectra.measure import Spectra


@click.command("analyze", short_help="Measure the singular values of every matrix.")
@click.argument("model")
@click.option("--against", metavar="MODEL", default=None, help="A second model with the same matrices, beside it.")
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
    from lowrank_kit.spectra.measure import compare, measure

    checkpoints = [Checkpoint.open(name) for name in (model, against) if name is not None]
    found = [measure(checkpoint, progress=verbosity >= 0) for checkpoint in checkpoints]
    if against is not None:
        compare(*found)
    names = _short_names([spectra.model for spectra in found])
    rows = [row for name, spectra in zip(names, found, strict=True) for row in _rows(name, spectra, every)]
    if against is None:
        rows = [{key: value for key, value in row.items() if key != "model"} for row in rows]
    text = text_table(rows) + "\n\nshares of min(out, in), means over the matrices of a role"
    document: dict[str, Any] = {
        "models": [
            {
                "model": spectra.model,
                "overall": vars(spectra.overall()),
                "roles": [vars(summary) for summary in spectra.by_role()],
                "matrices": [row.record() for row in spectra.rows],
            }
            for spectra in found
        ]
    }
    if output is not None:
        from lowrank_kit.spectra.write import write_spectra

        write_spectra(output, dict(zip(names, found, strict=True)), document)
        text += f"\nwrote {output}"
    emit(document, text, as_json)


def _short_names(paths: list[str]) -> list[str]:
    """The last parts of the paths, or the whole paths where those would be the same."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else paths


def _rows(name: str, spectra: Spectra, every: bool) -> list[dict[str, Any]]:
    if every:
        return [
            {
                "model": name,
                "matrix": row.name,
                "role": row.role,
                "out": row.shape[0],
                "in": row.shape[1],
                "stable rank": row.stable_rank,
                "effective rank": row.effective_rank,
                "share": row.share("effective_rank"),
                "rank 90 %": row.rank_90,
                "rank 95 %": row.rank_95,
                "rank 99 %": row.rank_99,
            }
            for row in spectra.rows
        ]
    return [
        {
            "model": name,
            "role": summary.role,
            "matrices": summary.num_matrices,
            "stable rank": summary.stable_rank_share,
            "effective rank": summary.effective_rank_share,
            "rank 90 %": summary.rank_90_share,
            "rank 95 %": summary.rank_95_share,
            "rank 99 %": summary.rank_99_share,
        }
        for summary in [*spectra.by_role(), spectra.overall()]
    ]
