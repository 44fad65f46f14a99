"""Peak memory of `lowrank compress --spill` on a model that is many times larger.

    python evals/streaming/memory.py --scratch BIG_DISK             # 8 GB of weights, half an hour of one core
    python evals/streaming/memory.py --scratch BIG_DISK --blocks 3  # the same but for the number of blocks

The model is random and removed afterwards. The command runs in a process of its own, whose resident memory (`VmHWM`,
pages of files that it maps included) and files are looked at twenty times a second. Beside it are measured: what an
interpreter takes that has imported the same and compressed nothing, and what the same command takes for a model 64
wide, which is all but the model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from models import MAX_BYTES, make_model

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.needs import planned_needs
from lowrank_kit.compression.plan import make_plan
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 4096,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
SETTINGS: dict[str, Any] = {
    "keep": 0.6,
    "objective": "whiten",
    "calibration_blocks": 16,
    "check_blocks": 2,
    "block_tokens": 256,
    "max_bytes": MAX_BYTES,
    "max_shard_bytes": 500_000_000,
}
# All but the model: the same text, and hardly any weights.
SMALL_MODEL = {**MODEL, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
# Everything that the command imports, and one decomposition, for LAPACK's own memory.
IDLE = """
import torch, transformers, cli.compress, lowrank_kit.compression.run
transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM
torch.linalg.eigh(torch.eye(64, dtype=torch.float64))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder on a disk with 25 GB free")
    parser.add_argument("--blocks", type=int, default=182)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results-memory.json")
    arguments = parser.parse_args()
    folder = arguments.scratch.resolve() / f"memory-{os.getpid()}"
    try:
        small, model = (
            make_model(folder / name, max_shard_bytes=SETTINGS["max_shard_bytes"], num_hidden_layers=blocks, **config)
            for name, blocks, config in (("small", 2, SMALL_MODEL), ("dense", arguments.blocks, MODEL))
        )
        found = measure(small, model, folder, arguments.threads)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_json(arguments.output, {**found, "environment": environment()})


def measure(small: Path, model: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Compress a model, and what it took against what it may take."""
    bound = bound_of(model)
    print(json.dumps(bound, indent=1), flush=True)
    surroundings = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    idle = int(subprocess.check_output([sys.executable, "-c", IDLE], cwd=ROOT, env=surroundings)) * 1024
    without_model = watched(small, folder / "small-run", surroundings)["peak"]
    run = watched(model, folder / "run", surroundings)
    own = run["peak"] - without_model
    found = {
        "weights": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "blocks": json.loads((model / "config.json").read_text())["num_hidden_layers"],
        "model": MODEL,
        "settings": SETTINGS,
        "seed": 0,
        "threads": threads,
        "idle": idle,
        "without a model": without_model,
        **run,
        "peak for the model": own,
        "bound": bound,
        "over bound": own / bound["bound"],
        "check": json.loads((folder / "run" / "out" / "compression.json").read_text())["check"],
    }
    print({key: found[key] for key in ("seconds", "peak", "idle", "without a model", "over bound", "disk")})
    return found


def bound_of(model: Path) -> dict[str, int]:
    """Bytes: weights of one block, the Grams of its inputs on one text, two activation streams, and a tenth."""
    settings = CompressSettings(**SETTINGS, allocation="uniform", form="factors", refine="none")
    checkpoint = Checkpoint.open(model)
    plan = make_plan(checkpoint, settings)
    spilled, held = (planned_needs(plan, settings, spill=spill) for spill in (True, False))
    block = next(one for one in spilled.sections if one.section == "model.layers.0")
    weights = 4 * sum(h.nbytes // 4 for n, h in checkpoint.headers.items() if n.startswith("model.layers.0."))
    stream = 4 * settings.calibration_blocks * SETTINGS["block_tokens"] * MODEL["hidden_size"]
    parts = {"weights of a block": weights, "its Grams": block.grams, "two streams": 2 * stream}
    estimates = {"estimate with --spill": spilled.memory, "estimate without": held.memory}
    return {**parts, "bound": round(1.1 * sum(parts.values())), **estimates}


def command(model: Path, folder: Path) -> list[str]:
    """The command line of the compression."""
    options = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    program = [sys.executable, "-m", "cli.main", "compress", str(model), *options, "--device", "cpu", "-q"]
    return [*program, "--spill", str(folder / "spill"), "-o", str(folder / "out")]


def watched(model: Path, folder: Path, surroundings: dict[str, str]) -> dict[str, Any]:
    """Seconds, peaks of memory and disk, and the peak when each section was done."""
    folder.mkdir()
    words = command(model, folder)
    started, process = time.perf_counter(), subprocess.Popen(words, cwd=ROOT, env=surroundings)
    found: dict[str, Any] = {"peak": 0, "anonymous": 0, "files": 0, "disk": 0}
    log, sections = folder / "out.partial" / "progress.jsonl", {}
    while process.poll() is None:
        if status := status_of(process.pid):
            for name, line in (("peak", "VmHWM"), ("anonymous", "RssAnon"), ("files", "RssFile")):
                found[name] = max(found[name], status.get(line, 0))
        found["disk"] = max(found["disk"], bytes_in(folder))
        if log.exists():
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            sections = {f"{line['stage']} {line['section']}": line["peak_memory"] for line in lines}
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{words}: exit code {process.returncode}")
    return {"seconds": round(time.perf_counter() - started, 1), **found, "peak after": sections}


def status_of(process: int) -> dict[str, int]:
    """Bytes of what /proc says of a process; nothing once it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in pairs if len(words) == 3 and words[2] == "kB"}


def bytes_in(folder: Path) -> int:
    """Of all files, some of which may go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


if __name__ == "__main__":
    main()
