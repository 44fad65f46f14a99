"""Every method of the compressor, alone and stacked, on three checkpoints of the quickstart: loss at equal parameters.

    lowrank quickstart -o MODELS
    python evals/compressor/methods.py run MODELS --corpus wikitext=FILE --corpus books=FILE   # what is missing
    python evals/compressor/methods.py run MODELS ... --share 0/2                              # every second run
    python evals/compressor/methods.py time MODELS                      # some methods once more, text and all
    python evals/compressor/methods.py table                                                   # README's tables

Calibration, refinement and check text are drawn, disjoint, from the part of the standard library that was trained on;
losses are on its held-out part and on the other corpora, which no choice has seen.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tables import picture, tables

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.loading import load_model, load_tokenizer
from lowrank_kit.compression.calibration import Calibration, calibrate
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.data.blocks import TokenBlocks, token_blocks
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.data.sources import read_source
from lowrank_kit.evaluation.perplexity import perplexity
from lowrank_kit.quickstart import SIZES
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json, write_png

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
TIMES = HERE / "results-time.json"
TRIALS = json.loads((HERE / "trials.json").read_text())
SIZE = SIZES["small"]
EVAL_BLOCKS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["run", "time", "table"])
    parser.add_argument("models", type=Path, nargs="?", help="folder of a quickstart")
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME=SOURCE", help="another text to score on")
    parser.add_argument("--share", default="0/1", help="i/n: take the runs whose number leaves i when divided by n")
    arguments = parser.parse_args()
    if arguments.stage == "run":
        place, of = map(int, arguments.share.split("/"))
        corpora = dict(pair.split("=", 1) for pair in arguments.corpus)
        torch.set_num_threads(1)
        run_missing(arguments.models, corpora, wanted()[place::of])
    elif arguments.stage == "time":
        torch.set_num_threads(1)
        write_json(TIMES, {"environment": environment(), "runs": timed_methods(arguments.models / "numuon")})
    else:
        runs = json.loads(RESULTS.read_text())["runs"]
        print(tables(runs, json.loads(TIMES.read_text())["runs"]))
        write_png(HERE / "front.png", picture(runs))


def wanted() -> list[dict[str, Any]]:
    """One entry for each optimizer and seed, which share a calibration; methods of all seeds come first."""
    methods = TRIALS["methods"]
    everywhere = [method for method, one in methods.items() if "seeds" not in one]
    return [
        {
            "optimizer": optimizer,
            "seed": seed,
            "trials": [
                {"optimizer": optimizer, "seed": seed, "method": method, "keep": keep}
                for method in chosen
                for keep in methods[method].get("keeps", TRIALS["keeps"])
                if seed in methods[method].get("seeds", TRIALS["seeds"])
            ],
        }
        for chosen in (everywhere, [method for method in methods if method not in everywhere])
        for seed in TRIALS["seeds"]
        for optimizer in TRIALS["optimizers"]
    ]


def run_missing(models: Path, corpora: dict[str, str], groups: list[dict[str, Any]]) -> None:
    """Run the trials that results.json does not hold, adding each as it is done."""
    texts: dict[str, TokenBlocks] = {}
    for group in groups:
        missing = [trial for trial in group["trials"] if not any(run["trial"] == trial for run in read_runs())]
        if not missing:
            continue
        folder = models / group["optimizer"]
        texts = texts or _texts(folder, corpora)
        known = calibrate(Checkpoint.open(folder), method_settings(TRIALS["best"], 0.5, group["seed"]), curvature=True)
        dense = {"trial": {**group, "method": "dense", "keep": None}} | {"loss": _losses(folder, texts)}
        dense["trial"].pop("trials")
        for trial in missing:
            _store(dense, _run(trial, folder, known, texts))


def read_runs() -> list[dict[str, Any]]:
    """Runs done so far."""
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []


def _store(*runs: dict[str, Any]) -> None:
    with (HERE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = read_runs()
        done += [run for run in runs if all(run["trial"] != one["trial"] for one in done)]
        write_json(RESULTS, {"environment": environment(), "runs": done})


def method_settings(method: str, keep: float, seed: int) -> CompressSettings:
    return CompressSettings(keep=keep, seed=seed, **TRIALS["text"], **TRIALS["methods"][method]["settings"])


def _run(trial: dict[str, Any], folder: Path, known: Calibration, texts: dict[str, TokenBlocks]) -> dict[str, Any]:
    settings = method_settings(trial["method"], trial["keep"], trial["seed"])
    # Every method pays for its own factorizations.
    fresh = replace(known, seconds=dict(known.seconds), nested={})
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        report = compress(folder, Path(scratch) / "out", settings, calibration=fresh)
        seconds = time.perf_counter() - started
        loss = _losses(Path(scratch) / "out", texts)
    found = {
        "trial": trial,
        "loss": loss,
        "numbers": report["totals"]["matrix_numbers_after"],
        "keep": report["totals"]["matrix_keep"],
        "check": report["check"],
        "forms": {form: sum(m["form"] == form for m in report["matrices"]) for form in ("dense", "factors", "pivoted")},
        "refined": report["refined"],
        "seconds": {**report["seconds"], "without calibration": round(seconds, 1)},
    }
    print(json.dumps({**trial, **loss}), flush=True)
    return found


def timed_methods(folder: Path) -> list[dict[str, Any]]:
    """Seconds of some methods at keep .4, text and all."""
    found = []
    for method in TRIALS["timed"]:
        with tempfile.TemporaryDirectory() as scratch:
            started = time.perf_counter()
            report = compress(folder, Path(scratch) / "out", method_settings(method, 0.4, 0))
            seconds = round(time.perf_counter() - started, 1)
        found.append({"method": method, "seconds": seconds, "stages": report["seconds"]})
        print(json.dumps(found[-1]), flush=True)
    return found


def _texts(folder: Path, corpora: dict[str, str]) -> dict[str, TokenBlocks]:
    """Name of a corpus -> blocks to score on."""
    tokenizer = load_tokenizer(folder)
    documents = {"stdlib": list(load_corpus(max_bytes=SIZE.max_bytes).heldout)}
    documents |= {name: list(read_source(source)) for name, source in corpora.items()}
    return {
        name: token_blocks(found, tokenizer, SIZE.block_tokens, max_blocks=EVAL_BLOCKS)
        for name, found in documents.items()
    }


def _losses(folder: Path, texts: dict[str, TokenBlocks]) -> dict[str, float]:
    model = load_model(Checkpoint.open(folder), device=torch.device("cpu"), dtype=torch.float32)
    return {name: perplexity(model, blocks, batch_size=32).loss_nats for name, blocks in texts.items()}


if __name__ == "__main__":
    main()
