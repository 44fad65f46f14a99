"""Kill the real command at random times, resume it, and compare the bytes with those of a run nobody disturbed.

    python evals/streaming/kills.py --kills 20

Two ways of compressing, each in memory and with --spill: 20 kills (SIGKILL) each. The time of a kill is drawn between
the beginning of the work and the end of an undisturbed run; a command that ends before its kill is compared, and a new
output is begun. Results are in results-kills.json, with what was there when the kill came. The checkout must stay as it
is meanwhile: a run goes on only with the commit that it was begun with.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from models import MAX_BYTES, make_model

from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = {
    "vocab_size": 2048,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
COMMON = {
    "keep": 0.6,
    "calibration-blocks": 128,
    "check-blocks": 16,
    "refine-blocks": 32,
    "block-epochs": 1,
    "block-tokens": 64,
    "max-bytes": MAX_BYTES,
    "max-shard-bytes": 500_000,
}
WAYS = {
    "whiten": {"objective": "whiten"},
    "anchored-two-sided, loss, refine block": {
        "objective": "anchored-two-sided",
        "allocation": "loss",
        "refine": "block",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results-kills.json")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    cases: list[dict[str, Any]] = []
    settings = {"model": MODEL, "common": COMMON, "ways": WAYS, "seed": arguments.seed, "threads": 1}
    with tempfile.TemporaryDirectory() as scratch:
        model = make_model(Path(scratch) / "dense", max_shard_bytes=500_000, **MODEL)
        for way, options in WAYS.items():
            for spilled in (False, True):
                folder = Path(scratch) / f"{len(cases)}"
                case = Case(model, folder, {**COMMON, **options}, spilled)
                cases.append({"way": way, "spill": spilled, **case.study(arguments.kills, chance)})
                print(cases[-1], flush=True)
                shutil.rmtree(folder)
                write_json(arguments.output, {**settings, "cases": cases, "environment": environment()})


class Case:
    """One way of compressing.

    Args:
        model: folder.
        folder: to work in.
        options: of the command line.
        spilled: whether to give --spill.
    """

    def __init__(self, model: Path, folder: Path, options: dict[str, Any], spilled: bool) -> None:
        folder.mkdir()
        self.folder, self.output, self.partial = folder, folder / "out", folder / "out.partial"
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self.words = [sys.executable, "-m", "cli.main", "compress", str(model), *words, "--device", "cpu", "-q"]
        self.words += ["-o", str(self.output), *(["--spill", str(folder / "spill")] if spilled else [])]

    def study(self, kills: int, chance: random.Random) -> dict[str, Any]:
        """So many kills, and whether all outputs had the bytes of the first."""
        begun, seconds = self.undisturbed()
        expected = self.contents()
        hit: Counter[str] = Counter()
        outputs, same, since = 0, True, 0
        while hit.total() < kills or since:
            wanted = hit.total() < kills
            after = chance.uniform(begun, seconds) if wanted else None
            if self.run(after, resume=since > 0):
                hit[self.stage()] += 1
                since += 1
                if self.partial.exists() or not self.output.exists():
                    continue  # else it was killed when all was done
            outputs, since = outputs + 1, 0
            same &= self.contents() == expected
        return {
            "kills": hit.total(),
            "outputs": outputs,
            "same bytes": same,
            "killed at": dict(hit),
            "seconds undisturbed": round(seconds, 2),
            "of them before the work": round(begun, 2),
            "sha256": expected,
        }

    def undisturbed(self) -> tuple[float, float]:
        """Seconds until the work began and until it ended."""
        started, begun = time.perf_counter(), None
        with self.started(resume=False) as process:
            while process.poll() is None:
                if begun is None and self.partial.exists():
                    begun = time.perf_counter() - started
                time.sleep(0.002)
        if process.returncode or begun is None:
            raise SystemExit(f"{self.words}: exit code {process.returncode}")
        return begun, time.perf_counter() - started

    def run(self, seconds: float | None, *, resume: bool) -> bool:
        """Run the command; whether it was killed after so many seconds."""
        with self.started(resume=resume) as process:
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                return process.wait() < 0
        if code:
            raise SystemExit(f"{self.words}: exit code {code}")
        return False

    def started(self, *, resume: bool) -> subprocess.Popen[bytes]:
        """The command, on one thread: on how many decides the last bits of a product."""
        words = [*self.words, *(["--resume"] if resume else [])]
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(words, cwd=ROOT, env=surroundings, stdout=subprocess.DEVNULL)

    def stage(self) -> str:
        """What was there when the kill came."""
        if not self.partial.exists():
            return "output named" if self.output.exists() else "nothing begun"
        if (self.partial / "whole").exists():
            return "output being named"
        if (self.partial / "result").exists():
            return "output being written"
        files = {part: len(list((self.partial / part).glob("*.safetensors"))) for part in ("sections", "survey")}
        for part, told in (("sections", "folding"), ("survey", "survey")):
            if files[part]:
                return f"{told}, {files[part]} sections done"
        return "first section" if (self.partial / "manifest.json").exists() else "checks and text"

    def contents(self) -> dict[str, str]:
        """SHA-256 of the weights and the config of an output, which is removed, and nothing else may be left."""
        left = [path for path in self.folder.rglob("*") if path.is_file() and self.output not in path.parents]
        if left:
            raise SystemExit(f"left behind: {left}")
        paths = sorted([*self.output.glob("*.safetensors"), self.output / "config.json"])
        found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
        shutil.rmtree(self.output)
        return found


if __name__ == "__main__":
    main()
