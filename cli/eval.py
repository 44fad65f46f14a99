"""`lowrank eval`: score models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .names import MODEL, SOURCE
from .options import common_options
from .output import emit


@click.command("eval")
@click.argument("models", nargs=-1, required=True, type=MODEL, metavar="MODEL...")
@click.option(
    "--text", type=SOURCE, metavar="SOURCE", default=None, help="File, folder, hub:NAME[:split] or stdlib (default)."
)
@click.option(
    "--part",
    type=click.Choice(["auto", "heldout", "all"]),
    default="auto",
    show_default=True,
    help="Which part of the source; auto: held out of stdlib, else all.",
)
@click.option("--perplexity/--no-perplexity", default=True, help="Whether to score perplexity.")
@click.option("--blocks", type=click.IntRange(1), default=256, show_default=True, help="Most sequences to score.")
@click.option("--block-tokens", type=click.IntRange(2), default=256, show_default=True, help="Tokens in a sequence.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Sequences in a forward pass.")
@click.option(
    "--reference", type=MODEL, metavar="MODEL", default=None, help="Measure the divergence (KL) from this model."
)
@click.option("--tasks", metavar="A,B", default="", help="lm-eval tasks.")
@click.option("--include-path", type=MODEL, metavar="DIR", default=None, help="Folder with further lm-eval tasks.")
@click.option("--limit", type=click.IntRange(1), default=None, help="Most documents of a task.")
@common_options
def command(
    models: tuple[str, ...],
    reference: str | None,
    tasks: str,
    device: str,
    dtype: str,
    as_json: bool,
    verbosity: int,
    **given: Any,
) -> None:
    """Score models, dense or compressed, side by side.

    All on the same text and lm-eval tasks, one row each; MODEL is a folder or a hub name.
    """
    from lowrank_kit.config import to_dict
    from lowrank_kit.evaluation.run import EvalSettings, evaluate
    from lowrank_kit.report.environment import environment

    names = tuple(name for task in tasks.split(",") if (name := task.strip()))
    settings = EvalSettings(tasks=names, **given)
    rows = evaluate(models, settings, reference=reference, device=device, dtype=dtype)
    document = {"models": rows, "settings": to_dict(settings), "environment": environment()}
    emit(document, _text(rows, settings.chosen_part, settings.text), as_json)


def _text(rows: list[dict[str, Any]], part: str, source: str | None) -> str:
    from lowrank_kit.report.tables import text_table

    table = text_table([_flat(row) for row in rows])
    scored = next((row for row in rows if "sha256" in row), None)
    if scored is None:
        return table
    hashes = ", ".join(dict.fromkeys(row["sha256"][:12] for row in rows))
    which = "held-out part" if part == "heldout" else "all"
    return f"{table}\n\ntext: {which} of {source or 'stdlib'}, {scored['tokens']:,} tokens scored, sha256 {hashes}"


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    shown = {
        "model": Path(row["model"]).name if Path(row["model"]).is_dir() else row["model"],
        "parameters": row["parameters"],
        "bytes": row["bytes"],
        "perplexity": row.get("perplexity"),
        "bits/byte": row.get("bits_per_byte"),
    }
    if "reference_kl_nats" in row:
        shown |= {"KL (nats)": row["reference_kl_nats"], "same top-1": row["reference_top1_agreement"]}
    for result in row.get("tasks", []):
        stderr = "" if result["stderr"] is None else f" ±{result['stderr']:.3f}"
        shown[f"{result['task']} {result['metric']}"] = f"{result['value']:.3f}{stderr}"
    return {key: value for key, value in shown.items() if value is not None}
