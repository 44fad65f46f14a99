"""Tokens per second of the same training loop with NuMuon's defaults and with AdamW, and the share of the optimizer.

    python evals/training/throughput.py                # preset 15m in float32 on one core
    python evals/training/throughput.py --device cuda  # preset 125m in bfloat16

Steps take turns; a ratio is formed within a round, and the table has its median with the smallest and largest.
Writes results-throughput-DEVICE.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_kit.device import product_flops
from lowrank_kit.optim import NuMuon, NuMuonFactory
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json
from lowrank_kit.report.tables import markdown_table
from lowrank_kit.training.estimate import estimate_run
from lowrank_kit.training.presets import model_config
from lowrank_kit.training.settings import TrainSettings
from lowrank_kit.training.wiring import optimizer_options

HERE = Path(__file__).parent
VOCABULARY = 32_000
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"model_config": "15m", "batch_size": 8, "block_tokens": 256},
    "cuda": {"model_config": "125m", "batch_size": 32, "block_tokens": 1024, "bf16": True},
}
RUNS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw"},
    "NuMuon": {"optimizer": "numuon"},
    "NuMuon, no spectral decay": {"optimizer": "numuon", "spectral_decay": 0.0},
    "NuMuon .25, no spectral decay": {"optimizer": "numuon", "spectral_decay": 0.0, "rank": "fixed:0.25"},
    "Muon": {"optimizer": "muon"},
}


class Loop:
    """A model, its optimizer and one batch."""

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        torch.manual_seed(0)
        self.settings, self.device = settings, device
        assert settings.model_config is not None
        config = model_config(settings.model_config, vocab_size=VOCABULARY, context=settings.block_tokens)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
        self.optimizer: NuMuon = NuMuonFactory()(self.model, **optimizer_options(settings))
        self.batch = torch.randint(VOCABULARY, (settings.batch_size, settings.block_tokens), device=device)
        self.flops = sum(
            estimate_run(self.model, self.optimizer, settings).flops[key] for key in ("model", "attention")
        )

    def passes(self) -> None:
        """Forward and backward."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            self.model(input_ids=self.batch, labels=self.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)

    def step(self) -> None:
        """The optimizer's."""
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Of one call, all of it done."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    size = SIZES[arguments.device]
    loops = {name: Loop(TrainSettings(steps=1000, **size, **run), device) for name, run in RUNS.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for number in range(arguments.rounds + 2):
        for name, loop in loops.items():
            found = seconds(loop.passes, device), seconds(loop.step, device)
            if number > 1:  # the first makes the state, the second is the first from a basis
                times[name].append(found)
    speed = product_flops(device, torch.bfloat16 if size.get("bf16") else torch.float32)
    tokens = size["batch_size"] * size["block_tokens"]
    rows = [row(name, loop, times, tokens, speed) for name, loop in loops.items()]
    print(markdown_table(rows))
    document = {"environment": environment(), **size, "product_flops_per_s": speed, "rows": rows}
    write_json(HERE / f"results-throughput-{arguments.device}.json", document)


def row(
    name: str, loop: Loop, times: dict[str, list[tuple[float, float]]], tokens: int, speed: float
) -> dict[str, Any]:
    """Figures of one run; model FLOPs are those of the estimate, without the optimizer's."""
    whole = [sum(pair) for pair in times[name]]
    ratios = [sum(base) / own for base, own in zip(times["AdamW"], whole, strict=True)]
    return {
        "optimizer": name,
        "tokens/s": tokens / median(whole),
        "of AdamW's": f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
        "optimizer's share": median(step / (passes + step) for passes, step in times[name]),
        "model FLOP/s of products'": loop.flops / median(whole) / speed,
    }


if __name__ == "__main__":
    main()
