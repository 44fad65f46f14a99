"""`lowrank train`: pretrain from a config, or fine-tune a checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .names import DEPTH_RULES, LR_SCHEDULES, MODEL, PACKINGS, PRESET_OR_FILE, SOURCE, TOPK, OfferedType
from .options import (
    device_option,
    given_parameters,
    json_option,
    optimizer_option,
    output_option,
    seed_option,
    verbosity_options,
)
from .output import check_new_folder, emit

if TYPE_CHECKING:
    from lowrank_kit.training.settings import TrainSettings

# Parameters of the verb that are no settings of the run.
NOT_SETTINGS = ("output", "resume", "dry_run", "device", "as_json", "config", "verbose", "quiet", "debug")


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(name for part in value.split(",") if (name := part.strip()))


@click.command("train")
@click.argument("model", required=False, type=MODEL)
@click.option(
    "--model-config",
    type=PRESET_OR_FILE,
    metavar="PRESET|FILE",
    default=None,
    help="Train from scratch: a preset, see below, or a config.",
)
@optimizer_option()
@click.option("--lr", type=float, default=None, help="Peak learning rate; left out, the optimizer's default.")
@click.option("--adamw-lr", type=float, default=None, help="Of embeddings, head and vectors; left out, --lr.")
@click.option("--rank", metavar="SCHEDULE", default=None, help="Of numuon: see below.")
@click.option(
    "--topk",
    type=OfferedType(*TOPK),
    metavar="NAME",
    default="warm",
    show_default=True,
    help="How numuon finds its step: see below.",
)
@click.option("--spectral-decay", type=float, default=None, help="Lowers all singular values of the matrices.")
@click.option(
    "--override", "overrides", metavar="PATTERN=RULE", multiple=True, help="By name, once or more often: see below."
)
@click.option(
    "--mup-base",
    type=PRESET_OR_FILE,
    metavar="DIR|FILE|PRESET",
    default=None,
    help="Smaller model the settings were tuned on.",
)
@click.option(
    "--mup-depth-rule",
    type=OfferedType(*DEPTH_RULES),
    metavar="RULE",
    default="k2",
    show_default=True,
    help="k2, k1 or none: see below.",
)
@click.option("--steps", type=int, default=None, help="Optimizer steps.")
@click.option("--tokens", type=int, default=None, help="Training tokens, in place of --steps.")
@click.option(
    "--text", type=SOURCE, metavar="SOURCE", default=None, help="File, folder, hub:NAME[:split] or stdlib (default)."
)
@click.option("--stream/--no-stream", default=None, help="Tokens from files in the cache; left out: see below.")
@click.option(
    "--packing",
    type=OfferedType(*PACKINGS),
    metavar="NAME",
    default="blocks",
    show_default=True,
    help="blocks or documents: see below.",
)
@click.option(
    "--lora", metavar="RANK", type=int, default=None, help="Train LoRA adapters of this rank, not MODEL itself."
)
@click.option("--lora-alpha", type=int, default=None, help="Their scale is alpha / rank; left out, twice the rank.")
@click.option("--lora-roles", metavar="A,B", default=None, callback=_names, help="Matrices with one; left out, all.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Sequences in a forward pass.")
@click.option("--accumulate", type=int, default=1, show_default=True, help="Forward passes in a step.")
@click.option("--block-tokens", type=int, default=256, show_default=True, help="Tokens in a sequence.")
@click.option(
    "--tokenizer", type=MODEL, metavar="DIR", default=None, help="A tokenizer; left out, the model's or a new BPE."
)
@click.option("--vocab-size", type=int, default=4096, show_default=True, help="Of a new BPE.")
@click.option(
    "--lr-schedule",
    type=OfferedType(*LR_SCHEDULES),
    metavar="NAME",
    default="cosine",
    show_default=True,
    help="cosine, linear, constant or wsd.",
)
@click.option("--warmup", type=float, default=0.05, show_default=True, help="Share of the steps.")
@click.option("--decay-share", type=float, default=0.2, show_default=True, help="Of wsd: share of the steps.")
@click.option("--min-lr", type=float, default=0.0, show_default=True, help="Of cosine and wsd: share of the peak.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True, help="Decoupled.")
@click.option("--momentum", type=float, default=None, help="Of numuon, muon and sgd.")
@click.option("--nesterov/--no-nesterov", default=None, help="Look ahead, of numuon, muon and sgd.")
@click.option("--clip", type=float, default=1.0, show_default=True, help="Largest gradient norm; 0: no clipping.")
@click.option("--bf16/--no-bf16", default=False, help="bfloat16 autocast; weights stay float32.")
@click.option("--checkpoint-activations", is_flag=True, default=False, help="Less memory, a third more work.")
@click.option("--compile", is_flag=True, default=False, help="Compile the model with torch.compile.")
@click.option(
    "--tracker", "trackers", metavar="NAME", multiple=True, help="tensorboard, wandb, trackio, ..., once or more often."
)
@click.option("--spectra-every", type=int, default=0, show_default=True, help="Steps between effective ranks: below.")
@click.option("--eval-every", type=int, default=0, show_default=True, help="Steps between validations.")
@click.option("--eval-blocks", type=int, default=64, show_default=True, help="Held-out sequences in a validation.")
@click.option("--save-every", type=int, default=0, show_default=True, help="Steps between checkpoints; 0: none.")
@click.option("--keep-checkpoints", type=int, default=2, show_default=True, help="How many of them stay.")
@click.option("--log-every", type=int, default=10, show_default=True, help="Steps between log lines.")
@click.option("--max-bytes", type=int, default=None, help="Most bytes of text to take.")
@click.option("--fsdp/--no-fsdp", default=False, help="Shard the model over the processes.")
@click.option("--replicas", type=int, default=1, show_default=True, help="Of the sharded model (HSDP).")
@click.option("--config", type=click.Path(path_type=Path), default=None, help="Settings from YAML or JSON; flags win.")
@click.option("--resume", is_flag=True, default=False, help="Go on from the newest whole checkpoint in DIR.")
@click.option("--dry-run", is_flag=True, default=False, help="Print what it would take and write nothing.")
@output_option(required=False)
@seed_option
@device_option
@json_option
@verbosity_options
@click.pass_context
def command(
    context: click.Context,
    output: Path | None,
    resume: bool,
    dry_run: bool,
    device: str,
    as_json: bool,
    config: Path | None,
    **_: Any,
) -> None:
    """Pretrain or fine-tune a model so that its matrices end up near low rank.

    Trains from --model-config, or MODEL (a folder or a hub name), on a text source; writes a Hugging Face folder.

    Presets are 1m, 2m, 5m, 15m, 60m, 125m, 350m and 1b, shaped as Llama, and qwen3-1m to qwen3-1b. --dry-run tells
    memory by part, disk and time, and needs no -o. A run that needs more memory than there is ends with exit code 3.

    A text is a file or folder (.txt .raw .md .rst .py, or .jsonl with a "text" field, each also .xz or .gz, or
    .parquet with a "text" column). Above 256 MB of text, compressed files counted four times, or with --stream, it
    is tokenized once, document by document, into files in $LOWRANK_CACHE (default ~/.cache/lowrank-kit), and read
    from there. A block of tokens holds documents one after another: with --packing blocks attention reaches over
    all of it, with documents it stays inside each.

    Rows of --text (.jsonl, .parquet, hub:) that hold "messages", "conversations", or "prompt" and "completion" are put
    in the form of the tokenizer's chat template, a sequence each, and their answers alone are learned. With --lora the
    folder holds the whole model, adapters merged in, and DIR/adapter the adapters, as PEFT has them.

    The defaults of --lr, --rank, --momentum, --nesterov and --spectral-decay are those of the optimizer; run.json holds
    what was chosen. A rank schedule reads fixed:0.25, cosine:1:0.25 (held at 1 for 10 % of the steps, at 0.25 from
    80 % on) or piecewise:1@0,0.5@0.3. The step is found by topk warm, krylov, exact or filter. An override reads
    "*.o_proj.*=adamw" or "*.down_proj.*=rank_schedule=fixed:0.5".

    With --mup-base, --lr and the rest are those of a smaller model of the same architecture, head size and share of
    key heads: spectral muP makes them those of this one, by width and by depth (k2; k1 and none are for comparison).
    mup.json says from what. `lowrank scale table` prints what becomes of them.

    On several devices: torchrun --nproc-per-node 2 --no-python lowrank train ..., or accelerate launch. Every process
    holds the model (DDP), or with --fsdp a part of it (FSDP2). A run may be resumed on another number of them.

    It validates before the first step, after the last and every --eval-every. log.jsonl is always written; a --tracker
    gets the same figures. Every --spectra-every steps the effective rank of each role is measured, on as many matrices
    of it, spread over the depth, as 1 % of the training's arithmetic pays for; where that is less than one of each
    role, at a multiple of those steps.
    """
    from lowrank_kit.config import load_settings
    from lowrank_kit.errors import UsageError
    from lowrank_kit.processes import disconnect, is_first
    from lowrank_kit.training.run import RUN_FILE, stored_settings, train
    from lowrank_kit.training.settings import TrainSettings

    given = {name: value for name, value in given_parameters(context).items() if name not in NOT_SETTINGS}
    if output is None and (resume or not dry_run):
        raise UsageError("no output folder", hint="-o DIR, or --dry-run for what it would take")
    if output is not None and not resume and is_first():  # which fills it while the others start
        check_new_folder(output)
    if output is not None and resume and config is None:
        # Resuming asks for the settings of the run, and for nothing else to be spelled out again.
        given = {**stored_settings(output), **given}
    settings = load_settings(TrainSettings, config, given)
    if dry_run:
        _dry_run(settings, device, as_json)
        return
    assert output is not None
    try:
        record = train(settings, output, resume=resume, device=device)
    except KeyboardInterrupt as stop:
        if settings.save_every and (output / RUN_FILE).exists():
            stop.add_note(f"lowrank train --resume -o {shlex.quote(str(output))}")
        raise
    disconnect()
    if is_first():
        emit(record, _text(record, output), as_json)


def _dry_run(settings: TrainSettings, device: str, as_json: bool) -> None:
    """Print the estimate, then end as the run would: refused if it does not fit."""
    from lowrank_kit.device import resolve_device
    from lowrank_kit.processes import is_first
    from lowrank_kit.report.tables import text_table
    from lowrank_kit.training.estimate import check_memory, report, report_rows
    from lowrank_kit.training.run import estimate

    found, torch_device = estimate(settings), resolve_device(device)
    if is_first():
        document = report(found, torch_device, bf16=settings.bf16)
        emit(document, f"{text_table(report_rows(document, settings))}\nnothing written (--dry-run)", as_json)
    check_memory(found.memory, settings, torch_device)


def _text(record: dict[str, Any], output: Path) -> str:
    import math

    loss, settings = record["validation_loss"], record["settings"]
    perplexity = math.exp(loss) if loss < 700 else math.inf  # a float64 ends at exp(709)
    answer = "answer " if "train_answer_tokens" in record["corpus"] else ""
    share = record["matrix_parameters"] / record["parameters"]
    adapters = f"{record['adapter_parameters']:,} parameters of adapters beside " if settings["lora"] else ""
    # On the same text, in blocks that the model has the context for.
    text = "" if settings["text"] is None else f" --text {shlex.quote(settings['text'])}"
    folder, half = shlex.quote(str(output)), shlex.quote(f"{output}-half")
    options = f"--keep 0.5{text} --block-tokens {settings['block_tokens']}"
    return "\n".join(
        [
            f"trained {adapters}{record['parameters']:,} parameters, {share:.0%} of them in matrices, "
            f"for {record['step']} steps of {record['step_tokens']:,} tokens",
            f"validation loss {loss:.4f} nats per {answer}token, perplexity {perplexity:.2f}",
            f"wrote {output}",
            f"next: lowrank compress {folder} {options} -o {half}",
        ]
    )
