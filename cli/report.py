"""`lowrank report`: one page of all results."""

from __future__ import annotations

from pathlib import Path

import click

from .options import json_option, verbosity_options
from .output import emit


@click.command("report")
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    default=Path("report.html"),
    show_default=True,
    help="The page; a new file.",
)
@click.option("--title", metavar="TEXT", default="lowrank report", show_default=True, help="Of the page.")
@json_option
@verbosity_options
def command(folders: tuple[Path, ...], output: Path, title: str, as_json: bool, verbosity: int) -> None:
    """Put results side by side, in one HTML page.

    Looks through DIR for what `lowrank train`, `analyze -o`, `compress`, `scale check -o`, `scale sweep` and
    `quickstart` write, for `lowrank eval --json > FILE.json`, and for results of experiments. The page has tables that
    sort, spectra, ranks by role and block, error through depth, loss against bytes with the Pareto front, loss against
    log2 of the learning rate, and where each number comes from. It needs no server and loads nothing from elsewhere.
    """
    from lowrank_kit.errors import UsageError

    if output.exists():
        raise UsageError(f"{output} exists", hint="give another file with -o, or remove this one")
    from lowrank_kit.report.files import write_text
    from lowrank_kit.summary.build import build_page
    from lowrank_kit.summary.find import find_documents

    documents = find_documents(folders)
    write_text(output, build_page(documents, title))
    found = [{"kind": one.kind, "file": str(one.path), "sha256": one.sha256} for one in documents]
    lines = [f"{one.kind:<12} {one.path}" for one in documents]
    size = output.stat().st_size
    text = "\n".join([*lines, "", f"wrote {output} ({size:,} bytes)"])
    emit({"report": str(output), "bytes": size, "found": found}, text, as_json)
