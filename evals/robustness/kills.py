"""Kill the real commands at random moments, go on with --resume, and compare with runs that nobody disturbed.

    python evals/robustness/kills.py

Three ways of `lowrank compress` and four of `lowrank train`, 100 kills (SIGKILL) in all. The moment of a kill is drawn
in CPU seconds of the process, which mean the same on a busy machine: nine of ten between the first file and the end of
the work in an undisturbed run, one before. A command that ends before its kill, or that follows on `MOST_IN_A_ROW` of
them, makes an output: each of its files is to have the bytes that the undisturbed run gave it (of logs and reports: but
for clocks), and nothing else may be left. Whatever is not so is in the results as a fault, with what was there, and the
script ends with 1. The checkout must stay as it is meanwhile: a compression goes on only with the commit that it was
begun with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json
from lowrank_kit.report.tables import markdown_table
from lowrank_kit.training.checkpoints import what_is_wrong

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TEXT_BYTES = 300_000
TEXT = "--text TEXT --block-tokens 64 --device cpu -q"
TRAIN = f"train {TEXT} --eval-blocks 8 --log-every 1"
COMPRESS = f"compress MODEL {TEXT} --keep 0.5 --calibration-blocks 32 --check-blocks 8 --max-shard-bytes 200000"
WAYS = {
    "train: NuMuon, from a config": f"{TRAIN} --model-config CONFIG --vocab-size 512 --steps 40 --save-every 3 "
    "--eval-every 7 --spectra-every 5",
    "train: AdamW, streamed, by documents": f"{TRAIN} --model-config CONFIG --vocab-size 512 --optimizer adamw "
    "--stream --packing documents --steps 60 --save-every 5",
    "train: LoRA on a model": f"{TRAIN} MODEL --lora 4 --steps 40 --save-every 3",
    "train: a compressed model": f"{TRAIN} SMALL --steps 30 --save-every 2",
    "compress: whiten": f"{COMPRESS} --objective whiten",
    "compress: by loss, refined twice, spilled": f"{COMPRESS} --objective anchored-two-sided --allocation loss "
    "--refine both --refine-blocks 32 --block-epochs 1 --e2e-epochs 1 --spill SPILL",
    "compress: by Fisher, pivoted": f"{COMPRESS} --objective two-sided --allocation lagrange --form pivoted",
}
MOST_IN_A_ROW = 6
BEFORE_THE_WORK = 0.1  # share of the kills
# Keys whose values are times, speeds and memory: no two runs have the same. In checkpoint.json, sizes of files: of one
# that holds such values.
CLOCKS = {"time", "tokens_per_s", "spectra_share", "peak_memory", "seconds", "seconds_left", "memory"}
CLOCKS |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "trainer_state.json"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all ways together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=HERE / "results-kills.json")
    parser.add_argument("--show", action="store_true", help="print the table of the results that there are")
    arguments = parser.parse_args()
    if arguments.show:
        print(markdown_table([row(case) for case in json.loads(arguments.output.read_text())["cases"]]))
        return
    chance, started = random.Random(arguments.seed), time.perf_counter()
    found: dict[str, Any] = {"kills": 0, "faults": 0, "seconds": 0, "seed": arguments.seed, "threads": 1}
    found |= {"model": CONFIG, "ways": WAYS, "cases": [], "environment": environment()}
    with tempfile.TemporaryDirectory() as scratch:
        places = make_models(Path(scratch))
        for number, (way, line) in enumerate(WAYS.items()):
            kills = arguments.kills * (number + 1) // len(WAYS) - arguments.kills * number // len(WAYS)
            case = Case(Path(scratch) / str(number), line, places).study(kills, chance)
            found["cases"].append({"way": way, **case})
            found["kills"] += case["kills"]
            found["faults"] += len(case["faults"])
            found["seconds"] = round(time.perf_counter() - started)
            print(json.dumps({**found["cases"][-1], "sha256": None}), flush=True)
            write_json(arguments.output, found)
    sys.exit(found["faults"] > 0)


def row(case: dict[str, Any]) -> dict[str, Any]:
    """What is told of a way in the table."""
    places = ", ".join(f"{place} {count}" for place, count in case["killed at"].items())
    counts = {"kills": case["kills"], "outputs": case["outputs"], "faults": len(case["faults"])}
    return {"way": case["way"], **counts, "what was there when the kill came": places}


def make_models(scratch: Path) -> dict[str, str]:
    """What the ways start from: a config, some of the standard library's text, a model and a compressed one."""
    names = {"CONFIG": "config.json", "TEXT": "text.jsonl", "MODEL": "model", "SMALL": "small"}
    places = {place: scratch / name for place, name in names.items()}
    documents = load_corpus(max_bytes=TEXT_BYTES).train
    places["TEXT"].write_text("".join(json.dumps({"text": document.text}) + "\n" for document in documents))
    (scratch / "config.json").write_text(json.dumps(CONFIG))
    given = {name: str(place) for name, place in places.items()}
    setup = Case(scratch / "setup", "", given)
    for line, name in (
        (f"{TRAIN} --model-config CONFIG --vocab-size 512 --steps 20", "MODEL"),
        (f"{COMPRESS} --objective whiten", "SMALL"),
    ):
        setup.words = [given.get(word, word) for word in line.split()] + ["-o", given[name]]
        if setup.run(None, resume=False).code:
            raise SystemExit(f"failed: {setup.words}")
    return given


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, negative for a signal; CPU seconds until all was done, and the first file."""

    code: int
    errors: str
    seconds: float
    begun: float | None


class Case:
    """One way, in a folder of its own.

    Args:
        folder: to make.
        line: the command, with names of places.
        places: name -> path; OUTPUT and SPILL are in the folder.
    """

    def __init__(self, folder: Path, line: str, places: dict[str, str]) -> None:
        folder.mkdir()
        self.folder, self.output = folder, folder / "out"
        places = {**places, "SPILL": str(folder / "spill")}
        self.words = [*(places.get(word, word) for word in line.split()), "-o", str(self.output)]

    def study(self, kills: int, chance: random.Random) -> dict[str, Any]:
        """So many kills, and what was not as it should be."""
        whole = self.run(None, resume=False)
        if whole.code or whole.begun is None:
            raise SystemExit(f"{self.words}: exit code {whole.code}\n{whole.errors}")
        expected = self.taken()
        hit: Counter[str] = Counter()
        outputs, in_a_row, faults = 0, 0, list[str]()
        while hit.total() < kills or in_a_row:
            after, resume = None, self.is_begun()
            if hit.total() < kills and in_a_row < MOST_IN_A_ROW:
                early = chance.random() < BEFORE_THE_WORK
                after = chance.uniform(0, whole.begun) if early else chance.uniform(whole.begun, whole.seconds)
            there = self.stage()
            ended = self.run(after, resume=resume)
            if ended.code < 0:
                hit[self.stage()] += 1
                in_a_row += 1
                if not self.is_done():
                    continue
            if ended.code > 0:
                faults.append(
                    f"{'resumed' if resume else 'begun'} at {there!r}: exit code {ended.code}: {ended.errors}"
                )
                self.clear()
            else:
                faults += [f"after {in_a_row} kills, {fault}" for fault in difference(expected, self.taken())]
            outputs, in_a_row = outputs + 1, 0
        return {
            "kills": hit.total(),
            "outputs": outputs,
            "faults": faults,
            "killed at": dict(sorted(hit.items())),
            "CPU seconds undisturbed": round(whole.seconds, 2),
            "of them before the first file": round(whole.begun, 2),
            "sha256": expected,
        }

    def run(self, after: float | None, *, resume: bool) -> Ended:
        """Run the command, on one thread: on how many decides the last bits of a product.

        Args:
            after: CPU seconds until it is killed; None leaves it in peace.
            resume: as the user does who sees that something is there.
        """
        words = [sys.executable, "-m", "cli.main", *self.words, *(["--resume"] if resume else [])]
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "LOWRANK_CACHE": str(self.folder / "cache")}
        begun, done, seconds = None, None, 0.0
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(words, cwd=ROOT, env=surroundings, stdout=subprocess.DEVNULL, stderr=errors) as process,
        ):
            watched = psutil.Process(process.pid)
            while process.poll() is None:
                with suppress(psutil.Error):
                    seconds = max(seconds, sum(watched.cpu_times()[:2]))
                if begun is None and any(self.folder.iterdir()):
                    begun = seconds
                if after is None and done is None and begun is not None and self.is_done():
                    done = seconds
                if after is not None and seconds >= after:
                    process.kill()
                    break
                time.sleep(0.005)
            code = process.wait()
            errors.seek(0)
            return Ended(code, errors.read().decode()[-1000:], done or seconds, begun)

    def is_begun(self) -> bool:
        """Whether a user would give --resume."""
        return self.output.exists() or self.output.with_name("out.partial").exists()

    def is_done(self) -> bool:
        """Whether there is nothing to go on with."""
        if self.words[0] == "compress":
            return self.output.exists() and not self.output.with_name("out.partial").exists()
        record = self.output / "run.json"
        return record.exists() and json.loads(record.read_text())["finished"]

    def stage(self) -> str:
        """What is there."""
        if self.is_done():
            return "all done"
        return self._stage_of_train() if self.words[0] == "train" else self._stage_of_compress()

    def _stage_of_train(self) -> str:
        if not self.output.exists():
            return "text being written" if (self.folder / "cache").exists() else "nothing begun"
        if not (self.output / "run.json").exists():
            return "folder being made"
        if (self.output / ".saving").exists():
            return "model being saved"
        if (self.output / "model.safetensors").exists():
            return "model saved"
        checkpoints = self.output / "checkpoints"
        if any(checkpoints.glob(".saving*")):
            return "checkpoint being saved"
        whole = any(what_is_wrong(path) is None for path in checkpoints.glob("checkpoint-*"))
        return "after a checkpoint" if whole else "before the first checkpoint"

    def _stage_of_compress(self) -> str:
        partial = self.output.with_name("out.partial")
        if not partial.exists():
            return "nothing begun"
        if (partial / "whole").exists():
            return "output being named"
        if (partial / "result").exists():
            return "output being written"
        for part, told in (("sections", "folding"), ("survey", "survey")):
            if any((partial / part).glob("*.safetensors")):
                return told
        return "first section" if (partial / "manifest.json").exists() else "checks and text"

    def taken(self) -> dict[str, str]:
        """SHA-256 of every file that the command has made, all of which are removed."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        found = {str(path.relative_to(self.folder)): hashlib.sha256(contents(path)).hexdigest() for path in files}
        self.clear()
        return found

    def clear(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def contents(path: Path) -> bytes:
    """The bytes of a file; of JSON with clocks in it, what is left without them.

    In the header of a checkpoint's safetensors, torch's words beside the tensors come in any order.
    """
    data = path.read_bytes()
    if path.suffix == ".safetensors" and "checkpoints" in path.parts:
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        header["__metadata__"]["DCP_SHARDING_INFO"] = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        return json.dumps(header, sort_keys=True).encode() + data[end:]
    if path.suffix not in (".json", ".jsonl") or not any(f'"{key}"'.encode() in data for key in CLOCKS):
        return data
    lines = data.splitlines() if path.suffix == ".jsonl" else [data]
    documents = [without_clocks(json.loads(line)) for line in lines]
    if path.name == "compression.jsonl":  # what was done again is told again
        documents = [document for at, document in enumerate(documents) if document not in documents[:at]]
    return json.dumps(documents).encode()


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(item) for key, item in value.items() if key not in CLOCKS}
    return [without_clocks(item) for item in value] if isinstance(value, list) else value


def difference(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """What is missing, other or left over."""
    return [
        f"{name} is {'missing' if name not in found else 'other' if name in expected else 'left over'}"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]


if __name__ == "__main__":
    main()
