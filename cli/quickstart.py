"""`lowrank quickstart`: the whole way in minutes."""

from __future__ import annotations

from pathlib import Path

import click

from .names import QUICKSTART_SIZES, OfferedType
from .options import json_option, seed_option, verbosity_options
from .output import check_new_folder, emit


@click.command("quickstart")
@click.option(
    "--size",
    type=OfferedType(*QUICKSTART_SIZES),
    metavar="NAME",
    default="small",
    show_default=True,
    help="small (under 5 minutes on 2 cores) or tiny.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    default=Path("quickstart"),
    show_default=True,
    help="Folder for the result; new or empty.",
)
@seed_option
@json_option
@verbosity_options
def command(size: str, output: Path, seed: int, as_json: bool, verbosity: int) -> None:
    """Train, analyze, compress and score small models, start to end.

    Needs no download: the text is the Python standard library's own sources.
    """
    check_new_folder(output)
    from lowrank_kit.quickstart import perplexity_rows, quickstart, table_rows
    from lowrank_kit.report.tables import text_table

    document = quickstart(output, size=size, seed=seed)
    text = f"""{text_table(table_rows(document))}

held-out perplexity:
{text_table(perplexity_rows(document))}

wrote {output} in {document["seconds"]:.0f} s: README.md, results.json, perplexity.png, spectra.png and the models"""
    emit(document, text, as_json)
