"""Wall time of `whiten` against what it cannot do without, and of a second budget on the same statistics.

    python evals/compressor/speed.py --preset 60m --repeats 3

The baseline is forward passes of the dense model over the calibration text, head and all, and one symmetric
eigendecomposition in float64 for each matrix, of its smaller side; both are timed in the same run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.loading import load_model
from lowrank_kit.compression.calibration import calibrate
from lowrank_kit.compression.evidence import foldable
from lowrank_kit.compression.run import compress
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.data.tokenizer import train_tokenizer
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json
from lowrank_kit.training.presets import model_config

HERE = Path(__file__).parent
MAX_BYTES = 2_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="60m")
    parser.add_argument("--blocks", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_model(Path(scratch) / "dense", arguments.preset)
        settings = CompressSettings(
            keep=0.6, objective="whiten", calibration_blocks=arguments.blocks, block_tokens=256, max_bytes=MAX_BYTES
        )
        runs = [measure(folder, Path(scratch) / f"out-{i}", settings) for i in range(arguments.repeats)]
    found = {
        "preset": arguments.preset,
        "threads": arguments.threads,
        "runs": runs,
        "whiten over baseline": median(run["whiten"] / run["baseline"] for run in runs),
        "second over first": median(run["second"] / run["whiten"] for run in runs),
        "environment": environment(),
    }
    write_json(HERE / "results-speed-cpu.json", found)
    print({key: found[key] for key in ("whiten over baseline", "second over first")})


def make_model(folder: Path, preset: str) -> Path:
    """A random model of a preset with a tokenizer: time does not depend on what the weights are."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(
        (d.text for d in load_corpus(max_bytes=MAX_BYTES).train), vocab_size=4096, model_max_length=256
    )
    AutoModelForCausalLM.from_config(model_config(preset, vocab_size=32_000, context=256)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(folder: Path, output: Path, settings: CompressSettings) -> dict[str, Any]:
    """Seconds of the parts, of `whiten` and of a second budget, text and loading left out of none."""
    calibration, calibrating = timed(lambda: calibrate(Checkpoint.open(folder), settings))
    report, first = timed(lambda: compress(folder, output / "first", settings, calibration=calibration))
    again = CompressSettings(**{**vars(settings), "keep": 0.4})
    _, second = timed(lambda: compress(folder, output / "second", again, calibration=calibration))
    model = load_model(Checkpoint.open(folder), device=torch.device("cpu"), dtype=torch.float32)
    ids = calibration.texts.calibration.ids.long()
    with torch.inference_mode():
        _, forward = timed(
            lambda: [model(input_ids=batch, use_cache=False) for batch in ids.split(settings.batch_size)]
        )
    sides = [min(stored.matrix.shape) for stored in foldable(Checkpoint.open(folder))]
    symmetric = {side: (root := torch.randn(side, side, dtype=torch.float64)) @ root.mT for side in set(sides)}
    _, decompositions = timed(lambda: [torch.linalg.eigh(symmetric[side]) for side in sides])
    return {
        "whiten": calibrating + first,
        "second": second,
        "baseline": forward + decompositions,
        "forward": forward,
        "decompositions": decompositions,
        "stages": report["seconds"],
    }


def timed(work: Any) -> tuple[Any, float]:
    """What a function gives, and how long it took."""
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


if __name__ == "__main__":
    main()
