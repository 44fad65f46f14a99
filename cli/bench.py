"""`lowrank bench`: speed and memory of models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lowrank_kit.errors import UsageError

from .names import MODEL
from .options import common_options, whole_numbers
from .output import emit

LONGEST_LABEL = 16


@click.command("bench")
@click.argument("models", nargs=-1, required=True, type=MODEL, metavar="MODEL...")
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a prompt.")
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens that follow it.")
@click.option(
    "--batch",
    "batches",
    metavar="A,B",
    default="1,4,16,64",
    show_default=True,
    callback=whole_numbers,
    help="Sequences at a time.",
)
@click.option("--compile", is_flag=True, default=False, help="Measure with torch.compile too.")
@click.option(
    "--fuse/--no-fuse",
    default=True,
    show_default=True,
    help="Low-rank layers that read the same input do it as one product.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="How often, models in turn.")
@click.option("--warmup", type=click.IntRange(0), default=1, show_default=True, help="Passes before, not counted.")
@click.option("--threads", type=click.IntRange(1), default=None, help="Of torch on the CPU; left out, its own.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", default=None, help="Write the JSON here too."
)
@common_options
def command(
    models: tuple[str, ...],
    output: Path | None,
    device: str,
    dtype: str,
    as_json: bool,
    verbosity: int,
    **given: Any,
) -> None:
    """Measure speed and memory of models, dense or compressed, side by side.

    MODEL is a folder or a hub name; the first is what the others are compared with. Prefill is one forward pass over
    random prompts, decode what follows token by token, greedy and with a cache. In every round all models take turns,
    and ratios are formed within a round; shown are medians, with the least and the largest of the ratios.
    """
    if output is not None and output.is_dir():
        raise UsageError(f"output {output} is a folder, a file is wanted", hint=f"-o {output / 'bench.json'}")
    from lowrank_kit.evaluation.bench import BenchSettings, bench
    from lowrank_kit.report.environment import environment

    found = bench(models, BenchSettings(**given), device=device, dtype=dtype)
    document = {**found, "environment": environment(with_devices=True)}
    text = bench_text(found)
    if output is not None:
        from lowrank_kit.report.files import write_json

        write_json(output, document)
        text += f"\nwrote {output}"
    emit(document, text, as_json)


def bench_text(document: dict[str, Any]) -> str:
    """The table of a bench, at most 120 wide, what was not measured, and what its columns are."""
    from lowrank_kit.evaluation.bench import flat_rows
    from lowrank_kit.report.tables import text_table

    rows = flat_rows(document)
    notes = [f"{row['model']}, batch {row['batch']}, {row['mode']}: {row['error']}" for row in rows if row["error"]]
    table = text_table([_shown(row) for row in rows])
    settings, measured = document["settings"], document["memory_measured"]
    legend = [
        f"prompts of {settings['prompt']} tokens, {settings['new_tokens']} new ones; {settings['rounds']} rounds on "
        f"{settings['device']}, {document['threads']} threads; tokens/s: medians",
        "speed: over the first model's in the same round, median (least to largest); FLOPs of prefill / decode and "
        "bytes of weights: also over the first's",
        f"memory: {measured or 'not measured on this system'}",
    ]
    return "\n".join([table, "", *notes, *legend])


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    from lowrank_kit.report.tables import amount

    label = row["model"]
    shown: dict[str, Any] = {
        "model": label if len(label) <= LONGEST_LABEL else f"…{label[1 - LONGEST_LABEL :]}",
        "batch": row["batch"],
        "mode": row["mode"],
    }
    for phase in ("prefill", "decode"):
        ratio = [row[f"{phase} {of}"] for of in ("over first", "least", "largest")]
        shown[f"{phase}/s"] = row[f"{phase} tokens/s"]
        shown[f"speed{' ' * (phase == 'decode')}"] = None if None in ratio else "{:.2f} ({:.2f}-{:.2f})".format(*ratio)
    shown["FLOPs"] = f"{row['prefill FLOPs']:.2f} / {row['decode FLOPs']:.2f}"
    shown["bytes"] = f"{row['bytes over first']:.2f}"
    return shown | {"memory": None if row["peak bytes"] is None else amount(row["peak bytes"])}
