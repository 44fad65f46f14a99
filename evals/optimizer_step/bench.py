"""Time, accuracy and memory of the rank-k step, against Newton-Schulz and torch.optim.Muon.

    python evals/optimizer_step/bench.py                # all parts, on the CPU with one thread
    python evals/optimizer_step/bench.py --device cuda  # the same table in bfloat16, larger matrices, a 100M model
    python evals/optimizer_step/bench.py --part quality

In the part `time` every ratio is formed within a round, in which all variants run one after the other; the table has
its median and its smallest and largest value over the rounds. In the part `step` the optimizers come one by one.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_kit.data.blocks import token_blocks
from lowrank_kit.data.corpus import load_corpus
from lowrank_kit.data.tokenizer import train_tokenizer
from lowrank_kit.linalg.polar import newton_schulz, polar_express
from lowrank_kit.linalg.spectral_filter import filter_topk_polar
from lowrank_kit.linalg.subspace import basis_columns, krylov_topk_polar, random_basis, warm_topk_polar
from lowrank_kit.linalg.topk import lmo_ratio, rank_of_fraction, topk_polar
from lowrank_kit.optim import NuMuon, parameter_groups
from lowrank_kit.report.environment import environment
from lowrank_kit.report.files import write_json, write_text
from lowrank_kit.report.tables import markdown_table

HERE = Path(__file__).parent
FRACTIONS = (0.05, 0.25, 0.5)
SHAPES = {
    "cpu": [(768, 768), (1024, 1024), (768, 2304), (1024, 3072), (2048, 2048), (2048, 6144)],
    "cuda": [(1024, 1024), (2048, 2048), (4096, 4096), (1024, 3072), (4096, 12288)],
}
# The goals of this benchmark: time of warm over one Newton-Schulz-5 of the same matrix.
GOALS = {0.05: 0.06, 0.25: 0.20, 0.5: 0.50}
LLAMAS = {
    "60m": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    "100m": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12, "num_attention_heads": 10},
}
VOCABULARY = 32_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; left out, all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the results and the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = arguments.output / f"results-{arguments.device}.json"
    # A part that is not run again keeps its results.
    document: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"device": arguments.device}
    for part in arguments.part or PARTS:
        document[part] = PARTS[part](torch.device(arguments.device), arguments.rounds)
        document.setdefault("environments", {})[part] = environment()
        print(f"## {part}\n\n{markdown_table(document[part])}\n", flush=True)
        write_json(results, document)
    tables = "\n\n".join(f"## {part}\n\n{markdown_table(document[part])}" for part in PARTS if part in document)
    write_text(arguments.output / f"tables-{arguments.device}.md", tables + "\n")


def time_ratios(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Time of one step of one matrix over that of one Newton-Schulz-5, by method, shape and rank fraction."""
    rows = []
    for shape in SHAPES[device.type]:
        M = decaying(shape).to(device)
        side = min(shape)
        variants: dict[str, Callable[[], Any]] = {
            "Newton-Schulz": partial(newton_schulz, M),
            "Polar Express": partial(polar_express, M),
            "exact": partial(topk_polar, M, side // 4),
        }
        for fraction in FRACTIONS:
            k = rank_of_fraction(fraction, shape)
            basis = random_basis(side, basis_columns(k, side), seed=0).to(device)
            for _ in range(3):
                _, basis = warm_topk_polar(M, k, basis)
            variants[f"warm {fraction}"] = partial(warm_topk_polar, M, k, basis)
            variants[f"krylov {fraction}"] = partial(krylov_topk_polar, M, k)
            if max(shape) <= 768:
                _, threshold = filter_topk_polar(M, k)
                variants[f"filter {fraction}"] = partial(filter_topk_polar, M, k, threshold)
        seconds = interleaved(variants, rounds)
        base = seconds["Newton-Schulz"]
        for fraction in FRACTIONS:
            warm, krylov = (seconds[f"{name} {fraction}"] for name in ("warm", "krylov"))
            rows.append(
                {
                    "shape": " x ".join(map(str, shape)),
                    "fraction": fraction,
                    "Newton-Schulz ms": 1e3 * median(base),
                    "warm": spread(ratios(warm, base)),
                    "goal": GOALS[fraction],
                    "krylov": spread(ratios(krylov, base)),
                    "krylov / warm": spread(ratios(krylov, warm)),
                    "exact": spread(ratios(seconds["exact"], base)),
                    "Polar Express": spread(ratios(seconds["Polar Express"], base)),
                    "filter": spread(ratios(seconds.get(f"filter {fraction}", []), base)),
                }
            )
    return rows


def quality(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """The step on real momentum: ratio to the exact step, largest singular value, rank; 12 steps of drift."""
    momenta = record_momentum(device, steps=30, recorded=12)
    rows = []
    for fraction in FRACTIONS:
        found: dict[str, list[tuple[float, float, float]]] = {}
        for matrices in momenta.values():
            k = rank_of_fraction(fraction, matrices[0].shape)
            side = min(matrices[0].shape)
            basis = random_basis(side, basis_columns(k, side), seed=0).to(device)
            for i, M in enumerate(matrices):
                step, basis = warm_topk_polar(M, k, basis, cold=i == 0)
                steps = {"warm": step}
                if i == len(matrices) - 1:
                    steps |= {"krylov": krylov_topk_polar(M, k), "exact": topk_polar(M, k)}
                    if side == max(M.shape):  # a few minutes each for the long ones
                        steps["filter"] = filter_topk_polar(M, k)[0]
                if i >= 4 and i % 3 == 2:
                    for name, each in steps.items():
                        values = torch.linalg.svdvals(each.double())
                        rank = (values > 1e-3).sum().item() / k
                        found.setdefault(name, []).append((lmo_ratio(M, each, k), values[0].item(), rank))
        for name, figures in found.items():
            ratio, largest, rank = zip(*figures, strict=True)
            rows.append(
                {
                    "fraction": fraction,
                    "method": name,
                    "LMO ratio": sum(ratio) / len(ratio),
                    "least LMO ratio": min(ratio),
                    "largest singular value": max(largest),
                    "largest rank / k": max(rank),
                    "steps": len(figures),
                }
            )
    return rows


def whole_step(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """`optimizer.step()` on a whole Llama, matrices and the rest, with the state it keeps."""
    name = "100m" if device.type == "cuda" else "60m"
    config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **LLAMAS[name])
    makers: dict[str, Callable[[nn.Module], list[torch.optim.Optimizer]]] = {
        "torch.optim.Muon": torch_muon,
        "muon": lambda model: ours(model, rule="muon"),
        "numuon 0.25 exact": lambda model: ours(model, topk="exact"),
        "numuon 0.25 krylov": lambda model: ours(model, topk="krylov"),
        "numuon 0.25": lambda model: ours(model),
        "numuon 0.25, basis in bfloat16": lambda model: ours(model, basis_dtype="bfloat16"),
        "numuon 0.5": lambda model: ours(model, rank_schedule="fixed:0.5"),
        "adamw": lambda model: ours(model, rule="adamw"),
    }
    seconds: dict[str, list[float]] = {}
    state: dict[str, dict[str, int]] = {}
    tokens = torch.randint(VOCABULARY, (4, 256), device=device)
    for label, make in makers.items():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(device)
        optimizers = make(model)

        def train_step(model: nn.Module = model) -> None:
            model.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                model(input_ids=tokens, labels=tokens).loss.backward()

        def step(optimizers: list[torch.optim.Optimizer] = optimizers) -> None:
            for optimizer in optimizers:
                optimizer.step()

        train_step()
        step()  # makes the state
        # torch's Muon works in bfloat16, which takes minutes a step on a CPU without instructions for it.
        repeats = 1 if label == "torch.optim.Muon" and device.type == "cpu" else rounds
        seconds[label] = timed(step, repeats)
        if label == "adamw":
            seconds["forward and backward"] = timed(train_step, rounds)
            grads = [
                p.grad for group in optimizers[0].param_groups if group["name"] == "matrices" for p in group["params"]
            ]
            svd = partial(svd_of_each, grads)
            seconds["torch.linalg.svd of each matrix"] = timed(svd, 1)
        state[label] = state_bytes(optimizers)
        print(f"{label}: {median(seconds[label]):.3f} s", file=sys.stderr, flush=True)
        del model, optimizers, step, train_step
        gc.collect()
    muon, whole = median(seconds["torch.optim.Muon"]), median(seconds["forward and backward"])
    return [
        {
            "step": label,
            "rounds": len(times),
            "ms": 1e3 * median(times),
            "least ms": 1e3 * min(times),
            "largest ms": 1e3 * max(times),
            "of torch.optim.Muon": median(times) / muon,
            "of forward and backward": median(times) / whole,
            "momentum MB": state.get(label, {}).get("momentum", 0) / 1e6 or None,
            "basis of momentum": basis_share(state.get(label, {})),
        }
        for label, times in seconds.items()
    ]


PARTS: dict[str, Callable[[torch.device, int], list[dict[str, Any]]]] = {
    "time": time_ratios,
    "quality": quality,
    "step": whole_step,
}


def ours(model: nn.Module, rule: str = "numuon", **options: Any) -> list[torch.optim.Optimizer]:
    """One optimizer for all; no health checks, which every 100th step has."""
    matrix = {"rank_schedule": "fixed:0.25", "health_every": 0, **options} if rule != "adamw" else {}
    return [NuMuon(parameter_groups(model, rule=rule, lr=1e-3, **matrix))]


def torch_muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """torch's own Muon for the matrices, its AdamW for the rest."""
    groups = parameter_groups(model, rule="muon", lr=1e-3)
    matrices = [p for g in groups if g["rule"] == "muon" for p in g["params"]]
    others = [p for g in groups if g["rule"] != "muon" for p in g["params"]]
    return [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(others, lr=1e-3)]


def svd_of_each(matrices: list[Tensor]) -> None:
    """What the exact step costs without this package's shortcut by the Gram of the smaller side."""
    for M in matrices:
        U, _, Vh = torch.linalg.svd(M, full_matrices=False)
        U[:, : min(M.shape) // 4] @ Vh[: min(M.shape) // 4]


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> dict[str, int]:
    """Bytes of the matrices' momentum and of the bases."""
    found: dict[str, int] = {}
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for key, value in state.items():
                found[key] = found.get(key, 0) + value.nbytes
    return found


def basis_share(state: dict[str, int]) -> float | None:
    """Bytes of the bases over those of the momentum."""
    return state["basis.0"] / state["momentum"] if "basis.0" in state else None


def timed(run: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each call."""
    return interleaved({"": run}, rounds, discarded=0)[""]


def interleaved(variants: dict[str, Callable[[], Any]], rounds: int, discarded: int = 1) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after some that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + discarded):
        for name, run in variants.items():
            _wait()
            started = time.perf_counter()
            run()
            _wait()
            if number >= discarded:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(times: list[float], base: list[float]) -> list[float]:
    """Round by round; none for a variant that was not run."""
    return [one / other for one, other in zip(times, base, strict=False)]


def spread(values: list[float]) -> str | None:
    """Median, with the smallest and largest."""
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else None


def decaying(shape: tuple[int, int]) -> Tensor:
    """A matrix whose singular values fall by 1e3, as those of momentum do."""
    rows, columns = shape
    side = min(shape)
    U = torch.linalg.qr(torch.randn(rows, side)).Q
    V = torch.linalg.qr(torch.randn(columns, side)).Q
    return (U * torch.logspace(0, -3, side)) @ V.mT


def record_momentum(device: torch.device, *, steps: int, recorded: int) -> dict[str, list[Tensor]]:
    """Momenta of four matrices of a Llama 768 wide, over the last steps of a short training with NuMuon."""
    corpus = load_corpus(max_bytes=4_000_000)
    tokenizer = train_tokenizer((d.text for d in corpus.train), 2048, 128)
    blocks = token_blocks(corpus.train, tokenizer, 128)
    shape = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 2, "num_attention_heads": 12}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=2048, **shape)).to(device)
    optimizer = NuMuon(parameter_groups(model, rule="numuon", lr=4e-3, rank_schedule="fixed:0.5"))
    chosen = {
        name: p
        for name, p in model.named_parameters()
        if name.endswith(("0.self_attn.q_proj.weight", "1.self_attn.o_proj.weight", "0.mlp.gate_proj.weight"))
        or name.endswith("1.mlp.down_proj.weight")
    }
    found: dict[str, list[Tensor]] = {name: [] for name in chosen}
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(steps):
        picked = order[8 * step : 8 * step + 8]
        tokens = torch.stack([torch.as_tensor(blocks[i]["input_ids"]) for i in picked]).to(device)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= steps - recorded:
            for name, p in chosen.items():
                found[name].append(optimizer.state[p]["momentum"].clone())
    return found


if __name__ == "__main__":
    main()
