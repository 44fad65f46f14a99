"""`lowrank scale sweep`: does the learning rate of a small model serve larger ones."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lowrank_kit.errors import CheckFailedError, UsageError

from .names import PRESET_OR_FILE, SOURCE
from .options import device_option, json_option, optimizer_option, output_option, verbosity_options, whole_numbers
from .output import check_new_folder, emit

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from lowrank_kit.scaling.transfer import Sweep

RESULTS = "sweep.json"
# Bytes of text read for each token that is wanted, and at least: a token of a small vocabulary has two to three.
TOKEN_BYTES, LEAST_BYTES = 8, 1_000_000
HEADINGS = ("axis", "rule", "width", "depth", "log2 lr", "by", "loss", "shift", "regret", "worst shift", "worst regret")
NOTE = (
    "log2 lr: of the least loss, by a parabola; shift: from the base's; regret: loss at the base's best rate - own "
    "least, in nats; worst: of single seeds\nmup: spectral muP; k1: its form for branches of one matrix; sp: the plain "
    "model at the base's rates"
)


def _rates(context: click.Context, parameter: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        low, high, step = ([float(part) for part in value.split(":")] + [1.0])[:3]
        if step <= 0 or value.count(":") not in (1, 2):
            raise ValueError
    except ValueError:
        raise click.BadParameter(f'"{value}" is no range of log2, such as -10:-4 or -10:-4:0.5') from None
    return tuple(low + i * step for i in range(int((high - low) / step + 1e-9) + 1))


@click.command("sweep")
@click.option(
    "--model-config",
    type=PRESET_OR_FILE,
    metavar="PRESET|FILE",
    required=True,
    help="The base: a preset of train, or a config.",
)
@click.option("--widths", metavar="A,B", default=None, callback=whole_numbers, help="Widths, at the base's depth.")
@click.option("--depths", metavar="A,B", default=None, callback=whole_numbers, help="Blocks, at the base's width.")
@click.option(
    "--lrs", metavar="LOW:HIGH[:STEP]", default="-10:-4", show_default=True, callback=_rates, help="log2 of the rates."
)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many, from 0 on.")
@optimizer_option()
@click.option("--steps", type=int, default=100, show_default=True, help="Optimizer steps of each training.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Sequences in a step.")
@click.option("--block-tokens", type=int, default=32, show_default=True, help="Tokens in a sequence.")
@click.option(
    "--text", type=SOURCE, metavar="SOURCE", default=None, help="File, folder, hub:NAME[:split] or stdlib (default)."
)
@click.option("--vocab-size", type=int, default=512, show_default=True, help="Of a new BPE.")
@click.option(
    "--control-seeds",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="How many of them also with the k1 rule and without any.",
)
@click.option("--resume", is_flag=True, default=False, help="Go on with the sweep in DIR, or add sizes or seeds to it.")
@output_option()
@device_option
@json_option
@verbosity_options
@click.pass_context
def command(
    context: click.Context,
    model_config: str,
    widths: tuple[int, ...] | None,
    depths: tuple[int, ...] | None,
    lrs: tuple[float, ...],
    seeds: int,
    control_seeds: int,
    resume: bool,
    output: Path,
    as_json: bool,
    verbosity: int,
    **training: Any,
) -> None:
    """Does the learning rate tuned on the base serve wider and deeper models?

    Trains the base and every other size at each learning rate and seed, on the same batches, and compares where the
    loss is least. PASS: under muP, over the mean of the seeds, no optimum is shifted by more than 0.75 in log2, and
    none of the sizes loses more than 0.02 nats at the base's best rate. Else the exit code is 4.

    Writes sweep.json after each size, rule and seed; in the end sweep.csv, with every loss, and sweep.png.
    """
    if not resume:
        check_new_folder(output)
    elif not (output / RESULTS).is_file():
        raise UsageError(f"nothing to resume in {output}: it has no {RESULTS}", hint="leave out --resume to start")
    from lowrank_kit.scaling.family import Size
    from lowrank_kit.scaling.sizes import depth_of, width_of
    from lowrank_kit.scaling.transfer import Grid

    config, blocks = _base(model_config, **training)
    base = Size(width_of(config), depth_of(config))
    controlled = tuple(range(min(control_seeds, seeds)))
    grid = Grid(base, widths or (), depths or (), lrs, tuple(range(seeds)), control_seeds=controlled)
    try:
        sweep = _run(grid, output, config, blocks, verbosity, **training)
    except KeyboardInterrupt as stop:
        if (output / RESULTS).exists():
            stop.add_note(f"the same command with --resume goes on in {shlex.quote(str(output))}")
        raise
    _finish(sweep, output, as_json)


def _base(
    model_config: str, *, text: str | None, vocab_size: int, block_tokens: int, steps: int, batch_size: int, **_: Any
) -> tuple[PreTrainedConfig, Tensor]:
    """Config of the base, and the blocks [N, T] that all sizes read."""
    from lowrank_kit.data.blocks import token_blocks
    from lowrank_kit.data.corpus import load_corpus
    from lowrank_kit.data.tokenizer import train_tokenizer
    from lowrank_kit.training.presets import model_config as read_config

    wanted = max(LEAST_BYTES, TOKEN_BYTES * steps * batch_size * block_tokens)
    corpus = load_corpus(text, max_bytes=wanted)
    tokenizer = train_tokenizer((document.text for document in corpus.train), vocab_size, block_tokens)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = read_config(model_config, vocab_size=len(tokenizer), context=block_tokens, **ids)
    return config, token_blocks(corpus.train, tokenizer, block_tokens).ids


def _run(
    grid: Any,
    output: Path,
    config: PreTrainedConfig,
    blocks: Tensor,
    verbosity: int,
    *,
    device: str,
    optimizer: str,
    steps: int,
    batch_size: int,
    **_: Any,
) -> Sweep:
    import hashlib

    from tqdm.auto import tqdm

    from lowrank_kit.config import to_dict
    from lowrank_kit.device import resolve_device
    from lowrank_kit.scaling.trainer import SizeTrainer
    from lowrank_kit.scaling.transfer import Sweep, shown
    from lowrank_kit.scaling.trial import TrialSettings

    settings = TrialSettings(optimizer=optimizer, steps=steps, batch_size=batch_size)
    digest = hashlib.sha256(blocks.numpy().astype("<i4").tobytes()).hexdigest()
    fixed = {"block_tokens": blocks.shape[1], "blocks_sha256": digest, "config": config.to_diff_dict()}
    sweep = Sweep(grid, output / RESULTS, {**to_dict(settings), **fixed})
    cells = sweep.missing()
    train = SizeTrainer(config, blocks, settings, device=resolve_device(device))
    with tqdm(total=len(cells), desc="sweep", unit="cell", disable=None if verbosity >= 0 else True) as bar:

        def tell(cell: Any) -> None:
            bar.set_postfix_str(f"{shown(cell.size)}, {cell.rule}, seed {cell.seed}")

        for cell in cells:
            sweep.run(train, [cell], told=tell)
            bar.update()
    return sweep


def _finish(sweep: Sweep, output: Path, as_json: bool) -> None:
    """Write CSV and picture, print the table, and fail where the rate does not transfer."""
    from lowrank_kit.report.files import write_csv, write_png
    from lowrank_kit.report.tables import text_table
    from lowrank_kit.scaling.picture import draw

    sweep.write()
    write_csv(output / "sweep.csv", sweep.points())
    write_png(output / "sweep.png", draw(sweep))
    verdict = sweep.verdict()
    table = text_table(verdict["rows"], (*HEADINGS, "verdict"))
    emit({"settings": sweep.settings, **verdict}, f"{table}\n\n{NOTE}\nwrote {output}", as_json)
    if not verdict["passed"]:
        raise CheckFailedError(f"the learning rate does not transfer: {'; '.join(verdict['reasons'])}")
