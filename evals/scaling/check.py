"""The spectral and the coordinate check over widths 32 to 256 and depths 4 to 64: muP, k1 and no scaling.

    python evals/scaling/check.py run          # what is missing in results-check.json; one core, about ten minutes
    python evals/scaling/check.py tables       # the tables of README.md, and the pictures of Muon-Kimi
    python evals/scaling/check.py run long     # depths to 256, into results-check-long.json; likewise tables long

Every size is trained for ten steps on the same bytes of the standard library's sources, 8 sequences of 32 in a step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json, write_png
from lowrank_kit.report.tables import markdown_table
from lowrank_kit.scaling.checks import Check, coordinate_check, spectral_check
from lowrank_kit.scaling.family import cross
from lowrank_kit.scaling.observe import BYTES, PLAIN, Row, Training, observe, text_batches
from lowrank_kit.scaling.write import check_plot

HERE = Path(__file__).parent
# Name of a run -> its results and its sizes.
RUNS = {
    "short": (HERE / "results-check.json", cross((32, 64, 128, 256), (4, 8, 16, 32, 64))),
    "long": (HERE / "results-check-long.json", cross((32,), (4, 16, 64, 256))),
}
OPTIMIZERS = {"muon": "Muon-Kimi", "adamw": "AdamW", "numuon": "NuMuon"}
SCALINGS = ("k2", PLAIN, "k1")
SEEDS = (0,)
TRAINING: dict[str, Any] = {"lr": 2**-7, "adamw_lr": 2**-7, "steps": 10}
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=88,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=BYTES,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)


def run(name: str) -> None:
    """Train what is missing, seed by seed; the results are written after each."""
    torch.set_num_threads(1)
    results, sizes = RUNS[name]
    document = json.loads(results.read_text()) if results.exists() else {"runs": []}
    document |= {"config": CONFIG.to_diff_dict(), "training": TRAINING, "environment": environment()}
    done = {(found["optimizer"], found["scaling"], found["seed"]) for found in document["runs"]}
    batches = text_batches(None, steps=TRAINING["steps"])
    for seed in SEEDS:
        for optimizer in OPTIMIZERS:
            for scaling in SCALINGS:
                if (optimizer, scaling, seed) in done:
                    continue
                started = time.perf_counter()
                training = Training(optimizer, seed=seed, **TRAINING)
                rows = list(observe(CONFIG, sizes, batches, training, scaling=scaling))
                seconds = time.perf_counter() - started
                one = {"optimizer": optimizer, "scaling": scaling, "seed": seed, "seconds": round(seconds, 1)}
                document["runs"].append({**one, "values": packed(rows)})
                write_json(results, document)
                print(f"{optimizer}, {scaling}, seed {seed}: {seconds:.0f} s", flush=True)


KEYS = ("width", "depth", "part", "condition", "step")


def packed(rows: list[Row]) -> list[list[Any]]:
    """[width, depth, part, condition, step, mean over the blocks] for each."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in KEYS), []).append(row["value"])
    return [[*key, float(f"{sum(values) / len(values):.4g}")] for key, values in found.items()]


def unpacked(one: dict[str, Any]) -> list[Row]:
    """Rows of the means."""
    start = {"scaling": one["scaling"], "seed": one["seed"], "block": None}
    return [
        {**start, **dict(zip(KEYS, key, strict=True)), "value": float("nan") if value is None else value}
        for *key, value in one["values"]
    ]


def checks_of(optimizer: str, results: Path) -> list[Check]:
    """Both checks of the means over seeds."""
    runs = json.loads(results.read_text())["runs"]
    rows = [row for one in runs if one["optimizer"] == optimizer for row in unpacked(one)]
    return [spectral_check(rows), coordinate_check(rows)]


def tables(name: str) -> None:
    """Print the tables, and draw the pictures of the short run."""
    rows: list[dict[str, Any]] = []
    for optimizer, label in OPTIMIZERS.items():
        checks = checks_of(optimizer, RUNS[name][0])
        for check in checks:
            rows += table_rows(label, check)
            if optimizer == "muon" and name == "short":
                write_png(HERE / f"{check.name}.png", check_plot(check, f"{label}: {check.name} check, flat is right"))
    for kind in ("C1.2 W2 W1", "RMS"):
        print(markdown_table([row for row in rows if kind in row]))


def table_rows(label: str, check: Check) -> list[dict[str, Any]]:
    """A row for each axis and scaling, a column for each condition: slopes of the MLP's pair / attention's."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in check.slopes:
        if row["verdict"] is not None:
            one = found.setdefault((row["axis"], row["scaling"]), {})
            before = f"{one[row['condition']]} / " if row["condition"] in one else ""
            one[row["condition"]] = f"{before}{row['slope']:+.2f}"
    return [{"optimizer": label, "over": axis, "scaling": scaling, **one} for (axis, scaling), one in found.items()]


if __name__ == "__main__":
    {"run": run, "tables": tables}[sys.argv[1]](*(sys.argv[2:] or ["short"]))
