"""Does a learning rate tuned on a small model serve wider and deeper ones: three optimizers, with norms and without.

    python evals/scaling/transfer.py run                     # train what is missing, hours on one core
    python evals/scaling/transfer.py run --folder DIR        # into another folder, to go on from there
    python evals/scaling/transfer.py tables                  # results, tables and pictures of what is there

Models of Starcoder2's form, whose MLP has two matrices, on the standard library's sources in a vocabulary of 320
tokens, 8 sequences of 32 tokens a step. muP is trained under three seeds, what stands beside it under one at least;
each cell is written when it is done.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Starcoder2Config

from lowrank_kit.config import to_dict
from lowrank_kit.data.blocks import token_blocks
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.data.tokenizer import train_tokenizer
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json, write_png
from lowrank_kit.report.tables import markdown_table
from lowrank_kit.scaling.family import Size
from lowrank_kit.scaling.optimum import MOST_REGRET, MOST_SHIFT
from lowrank_kit.scaling.trainer import SizeTrainer
from lowrank_kit.scaling.transfer import CONTROLS, MUP, RULES, Cell, Grid, Sweep, shown
from lowrank_kit.scaling.trial import TrialSettings

HERE = Path(__file__).parent
RESULTS = HERE / "results-transfer.json"
VOCABULARY, TOKENS, BYTES = 320, 32, 600_000
SEEDS, CONTROL_SEEDS = (0, 1, 2), (0,)
WIDTHS, DEPTHS = (32, 64, 128, 256), (4, 16, 64)
# Std of embeddings without norms, where nothing else brings the residual stream to a size near 1.
EMBEDDING_STD = 0.5
# Optimizer -> least log2 of its learning rates; half as large without norms, where training diverges earlier.
LEAST_RATES, RATES = {"muon": -9, "numuon": -9, "adamw": -11}, 8
# So many more where a deep model was best at the last: trained later, each rate being a run of its own.
FURTHER = {("depth", False, "adamw"): 2}
# The most telling first: what is varied, with norms or without, and the optimizer.
STUDIES = [
    ("depth", False, "muon"),
    ("width", True, "muon"),
    ("depth", True, "muon"),
    ("depth", False, "numuon"),
    ("depth", False, "adamw"),
    ("width", True, "numuon"),
    ("width", True, "adamw"),
    ("depth", True, "numuon"),
    ("depth", True, "adamw"),
    ("width", False, "muon"),
    ("width", False, "numuon"),
    ("width", False, "adamw"),
]


def main() -> None:
    """Run what is missing, or make the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "tables"])
    parser.add_argument("--folder", type=Path, default=HERE / "transfer", help="of the cells")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (run if arguments.stage == "run" else tables)(arguments.folder)


def run(folder: Path) -> None:
    """Train the cells that are not there."""
    blocks = read_blocks()
    for rules, (axis, norms, optimizer) in product(((MUP,), (MUP, *CONTROLS)), STUDIES):
        sweep = sweep_of(folder, axis, norms, optimizer)
        train = SizeTrainer(config(axis), blocks, trial(optimizer), prepare=None if norms else without_norms)
        cells = [cell for cell in sweep.grid.cells() if cell.rule in rules]
        sweep.run(train, cells, told=partial(_tell, sweep.path.stem))


def _tell(name: str, cell: Cell) -> None:
    print(f"{name}: {shown(cell.size)} {cell.rule}, seed {cell.seed}", flush=True)


def sweep_of(folder: Path, axis: str, norms: bool, optimizer: str, *seeds: tuple[int, ...]) -> Sweep:
    """One study: its grid, of the seeds of muP and of the other rules, and the losses that are there."""
    size = Size(config(axis).hidden_size, config(axis).num_hidden_layers)
    widths, depths = (WIDTHS, ()) if axis == "width" else ((), DEPTHS)
    least = LEAST_RATES[optimizer] - (not norms)
    count = RATES + FURTHER.get((axis, norms, optimizer), 0)
    rates = tuple(float(least + i) for i in range(count))
    ours, theirs = seeds or (SEEDS, CONTROL_SEEDS)
    grid = Grid(size, widths, depths, rates, ours, control_seeds=theirs)
    fixed = {"vocabulary": VOCABULARY, "block_tokens": TOKENS, "text_bytes": BYTES, "norms": norms}
    name = f"{optimizer}-{axis}-{'norms' if norms else 'no-norms'}.json"
    return Sweep(grid, folder / name, {**to_dict(trial(optimizer)), **fixed, "config": config(axis).to_diff_dict()})


def trial(optimizer: str) -> TrialSettings:
    """How each model is trained."""
    return TrialSettings(optimizer=optimizer, steps=100, batch_size=8)


def config(axis: str) -> Starcoder2Config:
    """The base of an axis: 64 wide with 2 blocks for widths, 32 wide with 4 blocks for depths."""
    width, depth = (64, 2) if axis == "width" else (32, 4)
    return Starcoder2Config(
        hidden_size=width,
        num_hidden_layers=depth,
        intermediate_size=4 * width,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        use_bias=False,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.5 * width**-0.5,
    )


@torch.no_grad()
def without_norms(model: PreTrainedModel) -> None:
    """Replace every norm by the identity, and bring the embeddings to a size for it."""
    for name, module in list(model.named_modules()):
        if "norm" in type(module).__name__.lower():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Identity())
    weight = model.get_input_embeddings().weight
    weight.mul_(EMBEDDING_STD / float(weight.std()))


def read_blocks() -> Tensor:
    """Token ids [N, T], the same for all studies."""
    corpus = load_corpus(max_bytes=BYTES)
    tokenizer = train_tokenizer((document.text for document in corpus.train), VOCABULARY, TOKENS)
    return token_blocks(corpus.train, tokenizer, TOKENS).ids


def tables(folder: Path) -> None:
    """Gather the studies that are there into one file, and print and draw them."""
    from lowrank_kit.scaling.picture import draw

    document: dict[str, Any] = {"environment": environment(), "studies": []}
    for axis, norms, optimizer in STUDIES:
        sweep = sweep_of(folder, axis, norms, optimizer)
        if not sweep.records:
            continue
        seeds = tuple(tuple(seed for seed in SEEDS if _whole(sweep, seed, rules)) for rules in ((MUP,), CONTROLS))
        name = f"{optimizer}, {axis}, {'norms' if norms else 'no norms'}"
        study: dict[str, Any] = {"name": name, "seeds": seeds, **json.loads(sweep.path.read_text())}
        if seeds[0]:  # those that all sizes are there of
            sweep = sweep_of(folder, axis, norms, optimizer, *seeds)
            study |= sweep.verdict()
            print(f"\n{name}\n\n{markdown_table(study['rows'])}")
            write_png(folder / f"{sweep.path.stem}.png", draw(sweep, name))
        document["studies"].append(study)
    write_json(RESULTS, document)
    print(f"\nThe largest size of each\n\n{markdown_table([_largest(study) for study in document['studies']])}")


def _largest(study: dict[str, Any]) -> dict[str, Any]:
    """What a study found for its largest size: under muP with the worst seed, and beside it."""
    last = {
        rule: max((row for row in study.get("rows", []) if row["rule"] == rule), key=itemgetter("width", "depth"))
        for rule in RULES
        if any(row["rule"] == rule for row in study.get("rows", []))
    }
    found: dict[str, Any] = {"study": study["name"]}
    if MUP in last:
        row, base = last[MUP], next(row for row in study["rows"] if row["verdict"] == "base")
        found["base"], found["size"] = f"{base['loss']:.2f}", f"{row['loss']:.2f}"
        for key, bound, digits in (("shift", MOST_SHIFT, 2), ("regret", MOST_REGRET, 3)):
            value = f"{row[key]:.{digits}f}"
            found[key] = f"{value if row[key] <= bound else f'**{value}**'} (worst {row[f'worst {key}']:.{digits}f})"
    for rule, label in (("k1", "k1"), ("sp", "plain")):
        found[label] = None if rule not in last else _beside(last[rule])
    return found


def _beside(row: dict[str, Any]) -> str:
    """Loss, shift and regret of a control."""
    if row["loss"] is None or row["loss"] > 10:
        return "does not train"
    return (
        f"{row['loss']:.2f}, {row['shift']:.2f}, {'diverges' if row['regret'] > 10 else format(row['regret'], '.3f')}"
    )


def _whole(sweep: Sweep, seed: int, rules: tuple[str, ...]) -> bool:
    """Whether all cells of the rules are there under a seed."""
    grid = replace(sweep.grid, seeds=(seed,), control_seeds=(seed,))
    return all(cell in sweep.records for cell in grid.cells() if cell.rule in rules)


if __name__ == "__main__":
    main()
