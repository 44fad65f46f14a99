"""`lowrank env`: the block to paste into a bug report."""

from __future__ import annotations

import click

from .options import json_option, verbosity_options
from .output import emit


@click.command("env")
@json_option
@verbosity_options
def command(as_json: bool, verbosity: int) -> None:
    """Describe this machine and its packages, to paste into a bug report."""
    from lowrank_kit.report.environment import environment

    found = environment(with_devices=True)
    width = max(map(len, found))
    text = "\n".join(f"{label:<{width}}  {value or 'none'}" for label, value in found.items())
    emit(found, text, as_json)
