"""Fine-tuning an AdamW checkpoint: what each optimizer learns of the new text, forgets of the old, and how it folds.

    python evals/finetune/finetune.py tune --old PROSE    # run what is missing of the trials behind the choice
    python evals/finetune/finetune.py report --old PROSE  # run what is missing of the chosen settings, over seeds

A small Llama is trained with AdamW on the old text, fine-tuned on the new one (the standard library's sources), then
compressed with `whiten` on the new text and scored on both. Trials that settings are chosen by train on, and are scored
on, splits of the training parts. The report is scored on the held-out parts, which no choice has seen. `--work DIR`
keeps the checkpoints that fine-tuning starts from; `--share 0/2` takes every second trial, to use two processes.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.loading import load_model, load_tokenizer
from lowrank_kit.compression.calibration import calibrate
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.config import load_settings
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.data.sources import Document
from lowrank_kit.data.tokenizer import train_tokenizer
from lowrank_kit.evaluation.run import EvalSettings, score
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json
from lowrank_kit.spectra.measure import measure
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
TRIALS = HERE / "trials.json"
KEEPS = (0.6, 0.4)
SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4}
MAX_BYTES = {"old": 3_000_000, "new": 2_000_000}
COMMON = {"batch_size": 8, "block_tokens": 128, "eval_blocks": 8}
BEFORE = {"optimizer": "adamw", "lr": 2e-3, "steps": 800}
STEPS = 150
SCORED_BLOCKS = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["tune", "report"])
    parser.add_argument("--old", required=True, help="text source of prose, which the checkpoint is trained on")
    parser.add_argument("--work", type=Path, help="folder for texts and checkpoints; left out, a temporary one")
    parser.add_argument("--share", default="0/1", help="i/n: take the trials whose number leaves i when divided by n")
    arguments = parser.parse_args()
    place, of = map(int, arguments.share.split("/"))
    wanted = _wanted(arguments.stage)[place::of]
    with tempfile.TemporaryDirectory() as scratch:
        run_missing(wanted, arguments.old, arguments.work or Path(scratch), Path(scratch))


def _wanted(stage: str) -> list[dict[str, Any]]:
    """The trials of a stage; settings of None are those of the checkpoint before fine-tuning."""
    trials = json.loads(TRIALS.read_text())
    if stage == "tune":
        return [{"settings": settings, "seed": 0, "stage": stage} for settings in [None, *trials["tune"]]]
    return [
        {"settings": settings, "seed": seed, "stage": stage, "name": name}
        for seed in trials["seeds"]
        for name, settings in {"before": None, **trials["report"]}.items()
    ]


def run_missing(wanted: list[dict[str, Any]], old: str, work: Path, scratch: Path) -> None:
    """Run the trials that results.json does not hold, adding each as it is done."""
    for number, trial in enumerate(wanted):
        if any(found["trial"] == trial for found in read_results()):
            continue
        texts = _texts(work, trial["stage"], old)
        before = _checkpoint(work / f"{trial['stage']}-before-{trial['seed']}", texts, trial["seed"])
        result = _run(trial, texts, before, scratch / f"{trial['stage']}-{number}")
        with (HERE / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_json(RESULTS, {"trials": [*read_results(), result]})
        print(json.dumps({"trial": trial, "loss": result["loss"], "change": result["change"]}), flush=True)


def read_results() -> list[dict[str, Any]]:
    """Trials done so far."""
    return json.loads(RESULTS.read_text())["trials"] if RESULTS.exists() else []


def _texts(work: Path, stage: str, old: str) -> Path:
    """Folder with old.jsonl and new.jsonl, each to be split by the corpus; for tuning the training parts of these."""
    folder = work / stage
    if (folder / "tokenizer").is_dir():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    training: list[Document] = []
    for name, source in (("old", old), ("new", None)):
        documents = load_corpus(source, max_bytes=MAX_BYTES[name]).train
        if stage == "tune":
            _write(folder / "whole.jsonl", documents)
            documents = load_corpus(str(folder / "whole.jsonl")).train
        _write(folder / f"{name}.jsonl", documents)
        training.extend(load_corpus(str(folder / f"{name}.jsonl")).train)
    tokenizer = train_tokenizer((document.text for document in training), 1024, COMMON["block_tokens"])
    shape = {"model_type": "llama", "tie_word_embeddings": True, **SHAPE}
    (folder / "model-config.json").write_text(json.dumps(shape))
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def _write(path: Path, documents: Sequence[Document]) -> None:
    path.write_text("".join(json.dumps({"text": document.text}) + "\n" for document in documents))


def _checkpoint(folder: Path, texts: Path, seed: int) -> Path:
    """The model that fine-tuning starts from: AdamW from scratch on the old text."""
    if not (folder / "model.safetensors").exists():
        start = {"model_config": str(texts / "model-config.json"), "tokenizer": str(texts / "tokenizer")}
        settings = {**start, **BEFORE, **COMMON, "text": str(texts / "old.jsonl"), "seed": seed}
        train(load_settings(TrainSettings, None, settings), folder, device="cpu")
    return folder


def _run(trial: dict[str, Any], texts: Path, before: Path, folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    new = str(texts / "new.jsonl")
    if trial["settings"] is None:
        folder = before
    else:
        settings = {**COMMON, "steps": STEPS, "model": str(before), "text": new, "seed": trial["seed"]}
        train(load_settings(TrainSettings, None, {**settings, **trial["settings"]}), folder, device="cpu")
    seconds = time.perf_counter() - started
    corpora = {name: load_corpus(str(texts / f"{name}.jsonl")) for name in ("new", "old")}
    sides = {name: corpus.heldout for name, corpus in corpora.items()}
    loss = {"dense": _losses(folder, sides, trial["seed"])}
    calibration = None
    for keep in KEEPS:
        compressing = CompressSettings(
            keep=keep, objective="whiten", block_tokens=COMMON["block_tokens"], text=new, seed=trial["seed"]
        )
        calibration = calibration or calibrate(Checkpoint.open(folder), compressing, device="cpu")
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            output = Path(scratch) / "compressed"
            compress(folder, output, compressing, calibration=calibration, device="cpu")
            loss[f"{keep:g}"] = _losses(output, sides, trial["seed"])
    return {
        "trial": trial,
        "loss": loss,
        "effective_rank_share": measure(Checkpoint.open(folder), progress=False).overall().effective_rank_share,
        "change": _change(before, folder),
        "corpus_sha256": {name: corpus.sha256 for name, corpus in corpora.items()},
        "train_seconds": round(seconds, 1),
        "environment": environment(),
    }


def _losses(folder: Path, sides: dict[str, tuple[Document, ...]], seed: int) -> dict[str, float]:
    settings = EvalSettings(part="heldout", blocks=SCORED_BLOCKS, block_tokens=COMMON["block_tokens"], seed=seed)
    model, tokenizer = load_model(Checkpoint.open(folder), device=torch.device("cpu")), load_tokenizer(folder)
    return {name: score(model, tokenizer, documents, settings)["loss"] for name, documents in sides.items()}


def _change(before: Path, after: Path) -> float:
    """|W_after - W_before| / |W_before| in the Frobenius norm, mean over the matrices."""
    checkpoints = [Checkpoint.open(folder) for folder in (before, after)]
    names = [matrix.matrix.parameter for matrix in checkpoints[0].matrices()]
    one, other = (dict(checkpoint.tensors(names)) for checkpoint in checkpoints)
    return sum(((other[name] - one[name]).norm() / one[name].norm()).item() for name in names) / len(names)


if __name__ == "__main__":
    main()
