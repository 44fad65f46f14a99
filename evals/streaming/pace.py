"""Wall time of a compression block by block against one with the whole model in memory.

    OMP_NUM_THREADS=2 python evals/streaming/pace.py --preset 60m --repeats 3    # a machine with nothing else to do

In memory: `calibrate` once and `compress` with it, timed together. Streamed: `compress` alone, and the same with its
activations in files. Each run is a process of its own, after all imports; who is first changes from round to round.
Ratios are formed within a round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from models import MAX_BYTES, make_model

from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json
from lowrank_kit.training.presets import model_config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMMON: dict[str, Any] = {"keep": 0.6, "calibration_blocks": 64, "block_tokens": 256, "max_bytes": MAX_BYTES}
WAYS: dict[str, dict[str, Any]] = {
    "whiten, uniform": {"objective": "whiten", "allocation": "uniform", "form": "factors", "refine": "none"},
    "two-sided, loss": {"objective": "two-sided", "allocation": "loss", "form": "factors", "refine": "none"},
}
KINDS = ("in memory", "streamed", "spilled")
RUN = """
import json, sys, time
from pathlib import Path
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.calibration import calibrate
from lowrank_kit.compression.progress import peak_memory
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings

AutoModelForCausalLM, LlamaForCausalLM
kind, model, folder, settings = sys.argv[1], sys.argv[2], Path(sys.argv[3]), CompressSettings(**json.loads(sys.argv[4]))
started, calibration = time.perf_counter(), None
if kind == "in memory":
    calibration = calibrate(Checkpoint.open(model), settings, device="cpu")
spill = folder / "spill" if kind == "spilled" else None
report = compress(model, folder / "out", settings, calibration=calibration, device="cpu", spill=spill)
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak": peak_memory(), "stages": report["seconds"], "check": report["check"]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="60m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=COMMON["calibration_blocks"])
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results-pace.json")
    arguments = parser.parse_args()
    common = {**COMMON, "calibration_blocks": arguments.blocks}
    with tempfile.TemporaryDirectory() as scratch:
        preset = model_config(arguments.preset, vocab_size=32_000, context=COMMON["block_tokens"])
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        config = {name: getattr(preset, name) for name in (*names, "num_key_value_heads", "head_dim")}
        model = make_model(Path(scratch) / "dense", max_shard_bytes=5 * 10**9, **config)
        settings = {"preset": arguments.preset, "model": config, "common": common, "ways": WAYS}
        found: dict[str, Any] = {}
        for way, options in WAYS.items():
            found[way] = study(model, {**common, **options}, arguments.repeats)
            results = {"results": found, "environment": environment(with_devices=True)}
            write_json(arguments.output, {**settings, **results})


def study(model: Path, settings: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Rounds of all kinds, and how they compare."""
    rounds = []
    for number in range(repeats):
        order = KINDS[number % len(KINDS) :] + KINDS[: number % len(KINDS)]
        rounds.append({kind: run(kind, model, settings) for kind in order})
        print({kind: round(found["seconds"], 2) for kind, found in rounds[-1].items()}, flush=True)
    ratios = {kind: [one[kind]["seconds"] / one["in memory"]["seconds"] for one in rounds] for kind in KINDS[1:]}
    over = {kind: {"median": median(found), "from": min(found), "to": max(found)} for kind, found in ratios.items()}
    print(over, flush=True)
    return {"rounds": rounds, "over in memory": over}


def run(kind: str, model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        words = [sys.executable, "-c", RUN, kind, str(model), folder, json.dumps(settings)]
        found: dict[str, Any] = json.loads(subprocess.check_output(words, cwd=ROOT).splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
