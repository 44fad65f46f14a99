"""Trials behind the quickstart's settings: one model per line of TRIALS, compressed to four sizes and scored.

    python evals/quickstart/trials.py                 # run what is missing in results.json, then print the table
    python evals/quickstart/trials.py --table         # only print the table

The quickstart reports perplexity on the held-out part of the corpus, so nothing here sees that part: the trials train
on, and are scored on, a split of the corpus' training part.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.loading import load_model, load_tokenizer
from lowrank_kit.compression.run import calibrate, compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.data.tokenizer import train_tokenizer
from lowrank_kit.evaluation.run import EvalSettings, score
from lowrank_kit.quickstart import KEEPS, SIZES, Size
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json
from lowrank_kit.report.tables import markdown_table
from lowrank_kit.spectra.measure import measure
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"

TRIALS: list[dict[str, Any]] = [
    {"optimizer": "adamw", "lr": 2e-3},
    {"optimizer": "adamw", "lr": 4e-3},
    {"optimizer": "muon", "lr": 2e-3},
    {"optimizer": "muon", "lr": 4e-3, "adamw_lr": 2e-3},
    {"optimizer": "numuon", "lr": 4e-3, "adamw_lr": 2e-3, "rank": "fixed:0.5"},
    {"optimizer": "numuon", "lr": 4e-3, "adamw_lr": 2e-3, "rank": "fixed:0.25"},
    {"optimizer": "numuon", "lr": 4e-3, "adamw_lr": 2e-3, "rank": "fixed:0.35"},
    {"optimizer": "numuon", "lr": 6e-3, "adamw_lr": 2e-3, "rank": "fixed:0.35", "weight_decay": 0.5},
    {"optimizer": "numuon", "lr": 4e-3, "adamw_lr": 2e-3, "rank": "cosine:1:0.25"},
    {"optimizer": "numuon", "lr": 4e-3, "adamw_lr": 2e-3, "rank": "piecewise:1@0,0.25@0.3"},
    {"optimizer": "numuon", "lr": 4e-3, "adamw_lr": 2e-3, "rank": "fixed:0.25", "weight_decay": 1.0},
    {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 1.0},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the trials to run, from 0")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another file, to run two halves at a time")
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        with tempfile.TemporaryDirectory() as scratch:
            _run_missing(arguments, Path(scratch))
    print(markdown_table([_row(trial) for trial in _read(arguments.results)["trials"]]))


def _read(results: Path) -> dict[str, Any]:
    return json.loads(results.read_text()) if results.exists() else {"trials": []}


def _run_missing(arguments: argparse.Namespace, scratch: Path) -> None:
    size, seed = SIZES[arguments.size], arguments.seed
    document = _read(arguments.results)
    text = scratch / "train.jsonl"
    corpus = load_corpus(max_bytes=size.max_bytes)
    text.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in corpus.train))
    inner = load_corpus(str(text))
    tokenizer = train_tokenizer((d.text for d in inner.train), size.vocab_size, size.block_tokens)
    tokenizer.save_pretrained(scratch / "tokenizer")
    (scratch / "model-config.json").write_text(
        json.dumps({"model_type": "llama", "tie_word_embeddings": True, **size.shape})
    )
    for index, trial in enumerate(TRIALS):
        key = {"size": arguments.size, "seed": seed, **trial}
        wanted = arguments.only is None or index in arguments.only
        if not wanted or any(done["trial"] == key for done in document["trials"]):
            continue
        found = _run(key, trial, size, scratch / f"{index}", text, seed)
        document["trials"].append(found)
        write_json(arguments.results, document)


def _run(key: dict[str, Any], trial: dict[str, Any], size: Size, folder: Path, text: Path, seed: int) -> dict[str, Any]:
    settings = TrainSettings(
        model_config=str(folder.parent / "model-config.json"),
        tokenizer=str(folder.parent / "tokenizer"),
        text=str(text),
        steps=size.steps,
        batch_size=size.batch_size,
        block_tokens=size.block_tokens,
        eval_blocks=size.eval_blocks,
        seed=seed,
        **trial,
    )
    train(settings, folder)
    perplexity = {"dense": _perplexity(folder, text, size, seed)}
    calibration = None
    for keep in KEEPS:
        compressing = CompressSettings(
            keep=keep, text=str(text), calibration_blocks=size.calibration_blocks, block_tokens=size.block_tokens
        )
        calibration = calibration or calibrate(Checkpoint.open(folder), compressing)
        output = folder.with_name(f"{folder.name}-{keep}")
        compress(folder, output, compressing, calibration=calibration)
        perplexity[f"{keep:g}"] = _perplexity(output, text, size, seed)
    return {
        "trial": key,
        "size": asdict(size),
        "perplexity": perplexity,
        "effective_rank_share": measure(Checkpoint.open(folder), progress=False).overall().effective_rank_share,
        "environment": environment(),
    }


def _perplexity(folder: Path, text: Path, size: Size, seed: int) -> float:
    settings = EvalSettings(text=str(text), part="heldout", blocks=size.eval_blocks, block_tokens=size.block_tokens)
    model = load_model(Checkpoint.open(folder), device=torch.device("cpu"))
    return score(model, load_tokenizer(folder), load_corpus(str(text)).heldout, settings)["perplexity"]


def _row(found: dict[str, Any]) -> dict[str, Any]:
    trial = found["trial"]
    return {
        "steps": found["size"]["steps"],
        "optimizer": trial["optimizer"],
        "lr": f"{trial['lr']:g}",
        "AdamW lr": f"{trial.get('adamw_lr') or trial['lr']:g}",
        "rank": trial.get("rank"),
        "weight decay": trial.get("weight_decay"),
        **found["perplexity"],
        "effective rank": found["effective_rank_share"],
    }


if __name__ == "__main__":
    main()
