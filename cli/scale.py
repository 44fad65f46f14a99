"""`lowrank scale`: settings of a small model for a large one: what they become, and whether that is right."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .names import DEPTH_RULES, OPTIMIZERS, PRESET_OR_FILE, SOURCE, OfferedType
from .options import (
    device_option,
    json_option,
    optimizer_option,
    output_option,
    seed_option,
    verbosity_options,
    whole_numbers,
)
from .output import check_new_folder, emit
from .scale_sweep import command as sweep

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from lowrank_kit.scaling.checks import Check
    from lowrank_kit.scaling.mup import MuP

# Of tables: the rules do not ask what the vocabulary is.
VOCABULARY, CONTEXT = 4096, 256
# Learning rates of `check`, at which the smallest models learn well.
RATES = {"sgd": 0.1}
RATE = 2**-7
HINT = "print what is trained with what: lowrank scale table"
COLUMNS = {key: key for key in ("role", "optimizer", "count")} | {"fan-in": "fan-in x", "fold": "fold", "std": "std x"}
VALUES = ("lr", "weight decay", "eps")
NO_MATRICES = ("embedding", "head", "router", "bias", "gain")


depth_option = click.option(
    "--depth-rule",
    type=OfferedType(*DEPTH_RULES),
    metavar="NAME",
    default="k2",
    show_default=True,
    help="k2, k1 or none (width alone).",
)


@click.group("scale")
def command() -> None:
    """Take settings tuned on a small model to a wide and deep one.

    Spectral muP: initialization, learning rates, weight decay and eps of every matrix go with width and depth such that
    the best settings of the small model are those of the large one.
    """


command.add_command(sweep)


@command.command("table")
@click.option(
    "--base",
    type=PRESET_OR_FILE,
    metavar="MODEL",
    required=True,
    help="What was tuned: a preset, a folder or a config.json.",
)
@click.option("--target", type=PRESET_OR_FILE, metavar="MODEL", required=True, help="What is to be trained, likewise.")
@optimizer_option("Of the matrices; see below.")
@depth_option
@click.option("--lr", type=float, default=None, help="Of the base's matrices; left out, ratios to it are printed.")
@click.option("--adamw-lr", type=float, default=None, help="Of embeddings, head and vectors; left out, --lr.")
@click.option("--weight-decay", type=float, default=None, help="Of the base, likewise.")
@click.option("--eps", type=float, default=None, help="Of the base's AdamW, likewise.")
@json_option
@verbosity_options
def table(
    base: str,
    target: str,
    optimizer: str,
    depth_rule: str,
    lr: float | None,
    adamw_lr: float | None,
    weight_decay: float | None,
    eps: float | None,
    as_json: bool,
    verbosity: int,
) -> None:
    """What each kind of parameter of the target is trained with.

    "fold" is the forward multiplier that is folded into a parameter, "std x" what its own initialization is multiplied
    by. An optimizer is adamw, lion, sgd, numuon, muon (as muon_kimi: steps as large as AdamW's), muon_spectral,
    muon_original (torch's), muon_polar, shampoo or soap. Vectors are not decayed.
    """
    from lowrank_kit.report.tables import text_table
    from lowrank_kit.scaling.mup import MuP

    rule = MuP(_config(base), _config(target), optimizer=optimizer, depth=depth_rule)
    given = {"lr": lr, "adamw_lr": lr if adamw_lr is None else adamw_lr, "weight_decay": weight_decay, "eps": eps}
    rows = _absolute(rule, given)
    document = {
        "base": base,
        "target": target,
        "optimizer": optimizer,
        "depth_rule": depth_rule,
        "width_ratio": rule.width_ratio,
        "depth_ratio": rule.depth_ratio,
        "settings": given,
        "rows": rows,
    }
    headings = {name: name if given[name.replace(" ", "_")] is not None else f"{name} x" for name in VALUES}
    text = (
        f"{target} for settings of {base}: width x {rule.width_ratio:g}, depth x {rule.depth_ratio:g}\n\n"
        f"{text_table(rows, {**COLUMNS, **headings})}\n\nx: times the base's"
    )
    emit(document, text, as_json)


def _config(source: str) -> PreTrainedConfig:
    """Of a preset, a folder or a config.json."""
    from lowrank_kit.training.presets import PRESETS, model_config

    return model_config(source, vocab_size=VOCABULARY if source in PRESETS else None, context=CONTEXT)


def _absolute(rule: MuP, given: dict[str, float | None]) -> list[dict[str, Any]]:
    """The rule's rows, with numbers in place of ratios for what is given; None for what a parameter has not."""
    from lowrank_kit.scaling.rules import step_of

    made = []
    for row in rule.rows():
        matrix = row["optimizer"] == rule.optimizer and row["role"] not in NO_MATRICES
        of_base = [given["lr" if matrix else "adamw_lr"], given["weight_decay"], given["eps"]]
        values = {name: row[name] * (1.0 if v is None else v) for name, v in zip(VALUES, of_base, strict=True)}
        if row["role"] in ("bias", "gain"):
            values["weight decay"] = None
        if step_of(row["optimizer"]).eps is None:
            values["eps"] = None
        made.append({**row, **values})
    return made


@command.command("check")
@click.option(
    "--model-config",
    type=PRESET_OR_FILE,
    metavar="PRESET|FILE",
    default="1m",
    show_default=True,
    help="The shape that is made in all sizes.",
)
@click.option(
    "--widths", metavar="A,B,...", default=None, callback=whole_numbers, help="The least is the base's; see below."
)
@click.option(
    "--depths", metavar="A,B,...", default="4,8,16", show_default=True, callback=whole_numbers, help="Likewise."
)
@click.option(
    "--optimizer",
    type=OfferedType(*OPTIMIZERS),
    metavar="NAME",
    default="muon",
    show_default=True,
    help="muon, numuon, adamw or sgd.",
)
@depth_option
@click.option("--lr", type=float, default=None, help="Constant learning rate; left out, see below.")
@click.option("--adamw-lr", type=float, default=None, help="Of embeddings, head and vectors; left out, see below.")
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True, help="Optimizer steps.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="How many; means are checked.")
@click.option(
    "--text", type=SOURCE, metavar="SOURCE", default=None, help="File, folder, hub:NAME[:split] or stdlib (default)."
)
@output_option(required=False)
@seed_option
@device_option
@json_option
@verbosity_options
@click.pass_context
def check(
    context: click.Context,
    output: Path | None,
    as_json: bool,
    verbosity: int,
    **options: Any,
) -> None:
    """Train small models for a few steps and see whether what should not go with the size does not.

    All widths at the least depth, and all depths at the least width. The spectral check is of condition 3.1 of spectral
    muP: products of the norms of two matrices of a branch, and of their updates; the coordinate check of the output of
    the last block. The slope of each, over width and over depth, is at most 0.15, else the exit code is 4. Beside it,
    under SP, are the same models without scaling, where slopes are 0.5 to 2.

    Left out, --widths are the least that heads and MLP of this shape allow, from 32 on, its double and fourfold; --lr
    is 2^-7, with sgd 0.1, and --adamw-lr the same, with muon and numuon a quarter. Every byte is a token. With -o,
    writes check.json, check.csv, spectral.png and coordinate.png.
    """
    if output is not None:
        check_new_folder(output)
    from lowrank_kit.errors import CheckFailedError
    from lowrank_kit.report.environment import environment
    from lowrank_kit.scaling.write import write_checks

    rows, checks = _checked(**options)
    document: dict[str, Any] = {
        "settings": options,
        "passed": all(each.passed for each in checks),
        "checks": {
            each.name: {"passed": each.passed, "seen": each.seen, "verdict": each.sentence(), "slopes": each.slopes}
            for each in checks
        },
        "environment": environment(),
    }
    text = "\n\n".join(_text(each) for each in checks)
    if output is not None:
        write_checks(output, rows, checks, document)
        text += f"\n\nwrote {output}"
    emit(document, text, as_json)
    if failed := [each.name for each in checks if not each.passed]:
        raise CheckFailedError(f"the {' and the '.join(failed)} check failed", hint=HINT)


def _checked(
    *,
    model_config: str,
    widths: tuple[int, ...] | None,
    depths: tuple[int, ...],
    optimizer: str,
    depth_rule: str,
    lr: float | None,
    adamw_lr: float | None,
    steps: int,
    seeds: int,
    text: str | None,
    seed: int,
    device: str,
) -> tuple[list[dict[str, Any]], list[Check]]:
    from lowrank_kit.device import resolve_device
    from lowrank_kit.scaling.checks import run_checks
    from lowrank_kit.scaling.family import cross, least_widths
    from lowrank_kit.scaling.observe import BYTES, PLAIN, Training, text_batches

    rate = RATES.get(optimizer, RATE) if lr is None else lr
    training = Training(optimizer, rate, adamw_lr, steps=steps, seed=seed)
    config = _config(model_config)
    sizes = cross(least_widths(config) if widths is None else widths, depths)
    batches = text_batches(text, steps=steps, seed=seed)
    config.get_text_config().vocab_size = BYTES
    scalings = (depth_rule, PLAIN)
    return run_checks(config, sizes, batches, training, scalings=scalings, seeds=seeds, device=resolve_device(device))


def _text(check: Check) -> str:
    from lowrank_kit.report.tables import text_table
    from lowrank_kit.scaling.checks import slope_rows

    return f"{text_table(slope_rows(check))}\n{check.sentence()}"
