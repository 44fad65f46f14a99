"""The same run on one process and on several: how far the losses come apart in 50 steps of float32.

    python evals/training/parity.py

On the CPU, over gloo, where accelerate is made to take it for an accelerator: what is compared is the arithmetic, not
the speed. FSDP2 over two processes is HSDP with one replica; HSDP has two replicas over two processes each. Writes
results-parity.json. The goal is 1e-5.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # for tests.training.launch, which forks the processes

from lowrank_kit.report.environment import environment  # noqa: E402
from lowrank_kit.report.files import write_json  # noqa: E402
from lowrank_kit.report.tables import markdown_table  # noqa: E402
from tests.training.launch import Run, errors_of, launch  # noqa: E402

RESULTS = Path(__file__).parent / "results-parity.json"
OPTIMIZERS = ("adamw", "numuon")
PLACES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "DDP, 2": (2, {}),
    "FSDP2, 2": (2, {"fsdp": True}),
    "HSDP, 2 x 2": (4, {"fsdp": True, "replicas": 2}),
}
MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SETTINGS = {"vocab_size": 512, "max_bytes": 500_000, "steps": 50, "batch_size": 8, "accumulate": 2, "block_tokens": 64}
SETTINGS |= {"log_every": 1, "eval_every": 25, "eval_blocks": 32}


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "model.json").write_text(json.dumps(MODEL))
        rows = [row for optimizer in OPTIMIZERS for row in compare(optimizer, Path(scratch))]
    print(markdown_table(rows))
    document = {"model": MODEL, "settings": SETTINGS, "environment": environment(), "rows": rows}
    write_json(RESULTS, document)


def compare(optimizer: str, scratch: Path) -> list[dict[str, Any]]:
    """A row for each place but the first, which it is compared with."""
    folders = {}
    for place, (processes, placement) in PLACES.items():
        folders[place] = scratch / f"{optimizer} {place}"
        settings = {"model_config": str(scratch / "model.json"), "optimizer": optimizer, **SETTINGS, **placement}
        launch(Run(str(folders[place]), settings, processes))
        if told := errors_of(folders[place]):
            raise SystemExit(f"{optimizer}, {place}: {told[0]}")
    one, *others = folders.values()
    return [
        {"optimizer": optimizer, "processes": place, **differences(one, folder)}
        for place, folder in zip(list(PLACES)[1:], others, strict=True)
    ]


def differences(one: Path, other: Path) -> dict[str, float]:
    """The largest of the training losses, the validation losses and the weights."""
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, other)]
    found = {
        f"largest difference, {key}": max(abs(a[key] - b[key]) for a, b in zip(*logs, strict=True) if key in a)
        for key in ("loss", "validation_loss")
    }
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    found["weights"] = max((weights[0][name] - weights[1][name]).abs().max().item() for name in weights[0])
    return found | {"last loss": logs[0][-2]["loss"] if "loss" in logs[0][-2] else logs[0][-1]["loss"]}


if __name__ == "__main__":
    main()
