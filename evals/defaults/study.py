"""Which optimizer settings fold best: small Llamas trained alike, compressed to four sizes and scored.

    python evals/defaults/study.py tune              # run what is missing of the trials behind the choice
    python evals/defaults/study.py report            # run what is missing of the chosen settings, over three seeds
    python evals/defaults/study.py tune --share 0/2  # every second one, to use two processes

The trials that settings are chosen by train on, and are scored on, a split of the corpus' training part. The report
trains on the whole training part and is scored on the held-out part, which no choice has seen.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.loading import load_model, load_tokenizer
from lowrank_kit.compression.calibration import calibrate
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.config import load_settings
from lowrank_kit.data.corpus import Corpus, load_corpus
from lowrank_kit.data.tokenizer import train_tokenizer
from lowrank_kit.evaluation.run import EvalSettings, score
from lowrank_kit.quickstart import KEEPS, SIZES
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json
from lowrank_kit.spectra.measure import measure
from lowrank_kit.training.run import train
from lowrank_kit.training.settings import TrainSettings

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
TRIALS = HERE / "trials.json"
SIZE = SIZES["small"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["tune", "report"])
    parser.add_argument("--share", default="0/1", help="i/n: take the trials whose number leaves i when divided by n")
    arguments = parser.parse_args()
    place, of = map(int, arguments.share.split("/"))
    wanted = _wanted(arguments.stage)[place::of]
    with tempfile.TemporaryDirectory() as scratch:
        run_missing(wanted, Path(scratch))


def _wanted(stage: str) -> list[dict[str, Any]]:
    """The trials of a stage: settings, seed and whether they are scored on the held-out part."""
    trials = json.loads(TRIALS.read_text())
    if stage == "tune":
        return [{"settings": settings, "seed": 0, "stage": stage} for settings in trials["tune"]]
    return [
        {"settings": settings, "seed": seed, "stage": stage, "name": name}
        for seed in trials["seeds"]
        for name, settings in trials["report"].items()
    ]


def run_missing(wanted: list[dict[str, Any]], scratch: Path) -> None:
    """Run the trials that results.json does not hold, adding each as it is done."""
    folders: dict[str, Path] = {}
    for number, trial in enumerate(wanted):
        if any(found["trial"] == trial for found in read_results()):
            continue
        if trial["stage"] not in folders:
            folders[trial["stage"]] = _prepare(scratch, trial["stage"])
        result = _run(trial, folders[trial["stage"]], scratch / f"{trial['stage']}-{number}")
        with (HERE / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_json(RESULTS, {"trials": [*read_results(), result]})
        print(json.dumps({"trial": trial, **result["perplexity"]}), flush=True)


def read_results() -> list[dict[str, Any]]:
    """Trials done so far."""
    return json.loads(RESULTS.read_text())["trials"] if RESULTS.exists() else []


def _prepare(scratch: Path, stage: str) -> Path:
    """Folder with tokenizer, config and, for tuning, the training part alone as a source."""
    folder = scratch / stage
    folder.mkdir()
    corpus = load_corpus(max_bytes=SIZE.max_bytes)
    if stage == "tune":
        lines = (json.dumps({"text": document.text}) + "\n" for document in corpus.train)
        (folder / "text.jsonl").write_text("".join(lines))
        corpus = load_corpus(str(folder / "text.jsonl"))
    tokenizer = train_tokenizer((d.text for d in corpus.train), SIZE.vocab_size, SIZE.block_tokens)
    tokenizer.save_pretrained(folder / "tokenizer")
    shape = {"model_type": "llama", "tie_word_embeddings": True, **SIZE.shape}
    (folder / "model-config.json").write_text(json.dumps(shape))
    return folder


def _run(trial: dict[str, Any], prepared: Path, folder: Path) -> dict[str, Any]:
    text: dict[str, Any] = (
        {"text": str(prepared / "text.jsonl")} if trial["stage"] == "tune" else {"max_bytes": SIZE.max_bytes}
    )
    fixed = {
        "model_config": str(prepared / "model-config.json"),
        "tokenizer": str(prepared / "tokenizer"),
        "steps": SIZE.steps,
        "batch_size": SIZE.batch_size,
        "block_tokens": SIZE.block_tokens,
        "eval_blocks": SIZE.eval_blocks,
        "seed": trial["seed"],
    }
    started = time.perf_counter()
    record = train(load_settings(TrainSettings, None, {**fixed, **text, **trial["settings"]}), folder)
    seconds = time.perf_counter() - started
    corpus = load_corpus(text.get("text"), max_bytes=text.get("max_bytes"))
    perplexity = {"dense": _perplexity(folder, corpus, trial["seed"])}
    calibration = None
    for keep in KEEPS:
        compressing = CompressSettings(
            keep=keep,
            objective="whiten",
            calibration_blocks=SIZE.calibration_blocks,
            block_tokens=SIZE.block_tokens,
            **text,
        )
        calibration = calibration or calibrate(Checkpoint.open(folder), compressing)
        output = folder.with_name(f"{folder.name}-{keep}")
        compress(folder, output, compressing, calibration=calibration)
        perplexity[f"{keep:g}"] = _perplexity(output, corpus, trial["seed"])
    return {
        "trial": trial,
        "perplexity": perplexity,
        "effective_rank_share": measure(Checkpoint.open(folder), progress=False).overall().effective_rank_share,
        "corpus_sha256": record["corpus"]["sha256"],
        "train_seconds": round(seconds, 1),
        "environment": environment(),
    }


def _perplexity(folder: Path, corpus: Corpus, seed: int) -> float:
    settings = EvalSettings(part="heldout", blocks=SIZE.eval_blocks, block_tokens=SIZE.block_tokens, seed=seed)
    model = load_model(Checkpoint.open(folder), device=torch.device("cpu"))
    return score(model, load_tokenizer(folder), corpus.heldout, settings)["perplexity"]


if __name__ == "__main__":
    main()
