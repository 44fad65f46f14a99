"""Speed and memory of models side by side: measured in turns, so that what slows a machine slows all of them alike."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.headers import DTYPE_BITS
from lowrank_kit.checkpoint.loading import load_model
from lowrank_kit.config import to_dict
from lowrank_kit.device import available_memory, freed_memory_kept, resolve_device, resolve_dtype
from lowrank_kit.errors import DoesNotFitError, UsageError
from lowrank_kit.evaluation.flops import TokenFlops, token_flops
from lowrank_kit.evaluation.speed import (
    COMPILED,
    EAGER,
    MEMORY_MEASURED,
    RECOMPILE_LIMIT,
    Runner,
    Timing,
    pass_bytes,
    peak_growth,
    weight_bytes,
)
from lowrank_kit.layers.fused import fuse
from lowrank_kit.report.tables import amount

logger = logging.getLogger(__name__)

SCHEMA = "lowrank-bench/1"
PHASES = ("prefill", "decode")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured.

    Args:
        prompt: tokens of a prompt, random ones.
        new_tokens: tokens that follow it, at least 2: the first comes of the prefill.
        batches: sequences at a time.
        compile: whether to measure with torch.compile too.
        fuse: whether layers that read the same input do it as one, `layers.fused`.
        rounds: how often, all models in turn.
        warmup: passes before, not counted; compiled, at least one.
        threads: of torch on the CPU; None leaves them.
        seed: of the prompts.

    Raises:
        UsageError: a number below the least, no batch, or one twice.
    """

    prompt: int = 512
    new_tokens: int = 64
    batches: tuple[int, ...] = (1, 4, 16, 64)
    compile: bool = False
    fuse: bool = True
    rounds: int = 5
    warmup: int = 1
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"prompt": 1, "new_tokens": 2, "rounds": 1, "warmup": 0, "threads": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}")
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) < len(self.batches):
            listed = ",".join(map(str, self.batches))
            raise UsageError(f'"{listed}" is no list of different batch sizes of 1 and more', hint="--batch 1,4,16,64")

    @property
    def modes(self) -> tuple[str, ...]:
        """Eager, and compiled if asked for."""
        return (EAGER, COMPILED) if self.compile else (EAGER,)


@dataclass
class Contender:
    """A model in memory, and what failed for it.

    Args:
        label: what to call it: the last part of its name, with a number where that is another's too.
        name: folder or hub name.
        model: in evaluation mode.
        flops: of a token.
        broken: mode -> why nothing more is tried in it.
    """

    label: str
    name: str
    model: PreTrainedModel
    flops: TokenFlops
    broken: dict[str, str] = field(default_factory=dict)


@dataclass
class Cell:
    """Model x batch x mode: what was measured, or why not."""

    contender: Contender
    batch: int
    mode: str
    timings: list[Timing] = field(default_factory=list)
    growth: int | None = None
    error: str | None = None


def bench(
    models: Sequence[str], settings: BenchSettings, *, device: str = "auto", dtype: str = "auto"
) -> dict[str, Any]:
    """Measure models side by side; all of them are in memory at once. The first is what others are compared with.

    Args:
        models: folders or hub names, dense or compressed; the same one twice tells the noise.
        settings: what to measure.
        device: where to compute.
        dtype: number format of the weights; `auto` is the checkpoint's own.

    Returns:
        The document of `lowrank bench --json`, without environment: `schema`, `settings`, `device`, `memory_measured`,
        `models` with sizes and FLOPs, and `rows`, each with the values of every round, or with `error`.

    Raises:
        UsageError: a model that is not there, is no causal LM, has no cache of keys and values, or fewer positions than
            there are tokens.
        DoesNotFitError: the weights are more than the memory that is left.
    """
    torch_device, torch_dtype = resolve_device(device), resolve_dtype(dtype)
    with _threads(settings.threads), freed_memory_kept():
        contenders = load(models, settings, torch_device, torch_dtype)
        # All models read the same tokens.
        vocabulary = min(each.model.get_input_embeddings().weight.shape[0] for each in contenders)
        generator = torch.Generator().manual_seed(settings.seed)
        prompts = torch.randint(vocabulary, (max(settings.batches), settings.prompt), generator=generator)
        cells = [
            cell
            for batch in settings.batches
            for mode in settings.modes
            for cell in measure(contenders, prompts[:batch].to(torch_device), mode, settings)
        ]
        return {
            "schema": SCHEMA,
            "settings": to_dict(settings) | {"device": str(torch_device), "dtype": dtype},
            "threads": torch.get_num_threads(),
            "memory_measured": MEMORY_MEASURED.get(torch_device.type),
            "models": [_described(each, contenders[0], settings) for each in contenders],
            "rows": [_row(cell, cells, settings) for cell in cells],
        }


def flat_rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of a document of `bench`: a row of plain numbers for each model, batch size and mode."""
    models = {model["label"]: model for model in document["models"]}
    rows = []
    for row in document["rows"]:
        shown = {"model": row["model"], "threads": document["threads"], "batch": row["batch"], "mode": row["mode"]}
        for phase in PHASES:
            timed = row[phase] or {"tokens_per_s": {}, "ratio": None}
            shown[f"{phase} tokens/s"] = timed["tokens_per_s"].get("median")
            for name, key in (("over first", "median"), ("least", "min"), ("largest", "max")):
                shown[f"{phase} {name}"] = (timed["ratio"] or {}).get(key)
            shown[f"{phase} FLOPs"] = models[row["model"]]["flop_ratio"][phase]
        shown["bytes over first"] = models[row["model"]]["byte_ratio"]
        rows.append({**shown, "peak bytes": row["peak_bytes"], "error": row["error"]})
    return rows


def load(
    models: Sequence[str], settings: BenchSettings, device: torch.device, dtype: torch.dtype | str
) -> list[Contender]:
    """Open all models, check them, and only then load them.

    Raises:
        UsageError, DoesNotFitError: as `bench`.
    """
    checkpoints = [Checkpoint.open(name) for name in models]
    flops = [token_flops(checkpoint) for checkpoint in checkpoints]
    for name, checkpoint in zip(models, checkpoints, strict=True):
        _check_model(name, checkpoint, settings)
    needed = sum(_loaded_bytes(checkpoint, dtype) for checkpoint in checkpoints)
    if needed > (left := available_memory(device)):
        raise DoesNotFitError(
            f"the weights of {len(models)} models take {amount(needed)}, and {amount(left)} are left on {device}",
            hint="models take turns, so all are in memory at once: fewer of them, or --dtype bfloat16",
        )
    loaded = [load_model(checkpoint, device=device, dtype=dtype).eval() for checkpoint in checkpoints]
    if settings.fuse:
        loaded = [fuse(model) for model in loaded]
    return [Contender(*each) for each in zip(_labels(models), models, loaded, flops, strict=True)]


def measure(contenders: Sequence[Contender], prompt: Tensor, mode: str, settings: BenchSettings) -> list[Cell]:
    """All models at one batch size: warm-up and memory of each, then rounds in which they take turns.

    Args:
        contenders: loaded.
        prompt: int64 [batch, tokens], on their device.
        mode: eager or compiled.
        settings: what to measure.
    """
    cells = [Cell(each, len(prompt), mode, error=each.broken.get(mode)) for each in contenders]
    runners = [Runner(each.model, prompt, settings.new_tokens, mode) for each in contenders]
    with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, accumulated_recompile_limit=RECOMPILE_LIMIT):
        for cell, runner in zip(cells, runners, strict=True):
            logger.info("%s, batch %d, %s", cell.contender.label, cell.batch, mode)
            _guarded(cell, partial(_warm, cell, runner, settings))
        for _ in range(settings.rounds):
            for cell, runner in zip(cells, runners, strict=True):
                _guarded(cell, partial(_time, cell, runner))
    if mode == COMPILED:
        torch._dynamo.reset()  # what was compiled for this batch, and its graphs' memory
    return cells


def _warm(cell: Cell, runner: Runner, settings: BenchSettings) -> None:
    """Passes that do not count, and one of its own for memory."""
    model, batch = cell.contender.model, cell.batch
    wanted, left = pass_bytes(model, batch, settings.prompt, settings.new_tokens), available_memory(model.device)
    if model.device.type != "cuda" and wanted > left:
        raise MemoryError(f"about {amount(wanted)} beside the weights, {amount(left)} are left")
    before = torch.cuda.memory_allocated(model.device) if model.device.type == "cuda" else 0
    for _ in range(max(settings.warmup, int(cell.mode == COMPILED))):
        runner()
    # What stays between the passes: a static cache, graphs of CUDA calls. The compiler's own memory is not the model's.
    kept = runner.cache_bytes()
    if model.device.type == "cuda":
        kept = torch.cuda.memory_allocated(model.device) - before
    growth = peak_growth(runner, model.device)
    cell.growth = None if growth is None else kept + growth


def _time(cell: Cell, runner: Runner) -> None:
    cell.timings.append(runner())


def _guarded(cell: Cell, work: Callable[[], None]) -> None:
    """Do a part of a cell; what ends it is told in its row, and the run goes on."""
    if cell.error is not None:
        return
    try:
        work()
    except (MemoryError, torch.OutOfMemoryError) as error:
        cell.error = f"does not fit: {_first_line(error)}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    except Exception as error:
        # A compiler has as many exceptions as it has parts; eager, it is an error like any other.
        if cell.mode != COMPILED:
            raise
        cell.error = cell.contender.broken[COMPILED] = f"torch.compile failed: {_first_line(error)}"
    if cell.error is not None:
        cell.timings.clear()
        logger.warning("%s, batch %d, %s: %s", cell.contender.label, cell.batch, cell.mode, cell.error)


def _described(contender: Contender, first: Contender, settings: BenchSettings) -> dict[str, Any]:
    def flops(of: Contender) -> dict[str, float]:
        decode = of.flops.decode(settings.prompt, settings.new_tokens)
        return {"prefill": of.flops.prefill(settings.prompt) / settings.prompt, "decode": decode}

    own, base = flops(contender), flops(first)
    return {
        "label": contender.label,
        "model": contender.name,
        "parameters": sum(parameter.numel() for parameter in contender.model.parameters()),
        "dtype": str(contender.model.dtype).removeprefix("torch."),
        "weight_bytes": weight_bytes(contender.model),
        "byte_ratio": weight_bytes(contender.model) / weight_bytes(first.model),
        "flops_of": vars(contender.flops),
        "flops_per_token": own,
        "flop_ratio": {phase: own[phase] / base[phase] for phase in PHASES},
    }


def _row(cell: Cell, cells: Sequence[Cell], settings: BenchSettings) -> dict[str, Any]:
    """A cell in numbers, beside the first model's at the same batch size and in the same mode."""
    first = next(each for each in cells if (each.batch, each.mode) == (cell.batch, cell.mode))
    row: dict[str, Any] = {"model": cell.contender.label, "batch": cell.batch, "mode": cell.mode, "error": cell.error}
    tokens = {"prefill": cell.batch * settings.prompt, "decode": cell.batch * (settings.new_tokens - 1)}
    calls = {"prefill": 1, "decode": settings.new_tokens - 1}
    for phase in PHASES:
        own, base = ([getattr(timing, f"{phase}_s") for timing in each.timings] for each in (cell, first))
        row[phase] = summary(own, base, tokens[phase], calls[phase]) if own else None
    row["peak_bytes"] = None if cell.growth is None else weight_bytes(cell.contender.model) + cell.growth
    return row


def summary(own: Sequence[float], base: Sequence[float], tokens: int, calls: int) -> dict[str, Any]:
    """Medians and ranges over rounds.

    Args:
        own: seconds of each round.
        base: seconds of the first model in the same rounds; none if it was not measured.
        tokens: in a round.
        calls: forward passes in a round.

    Returns:
        `seconds` of every round; `tokens_per_s`, latency `ms` of a forward pass, and `ratio`, of speed over the first
        model's in the same round; each but the seconds with median, min and max. The ratio is None without a base.
    """
    ratios = [before / after for before, after in zip(base, own, strict=True)] if base else []
    return {
        "seconds": list(own),
        "tokens_per_s": _spread([tokens / value for value in own]),
        "ms": _spread([1000 * value / calls for value in own]),
        "ratio": _spread(ratios) if ratios else None,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _check_model(name: str, checkpoint: Checkpoint, settings: BenchSettings) -> None:
    model = checkpoint.meta_model()
    config = model.config.get_text_config()
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise UsageError(
            f"{name}: {type(model).__name__} has no cache of keys and values", hint="leave out models of another kind"
        )
    positions = getattr(config, "max_position_embeddings", None)
    wanted = settings.prompt + settings.new_tokens
    if positions is not None and wanted > positions:
        fitting = positions - settings.new_tokens
        raise UsageError(
            f"a prompt of {settings.prompt} tokens and {settings.new_tokens} new ones are more than the {positions} "
            f"positions of {name}",
            hint=f"--prompt {fitting}, or shorter" if fitting > 0 else "fewer --new-tokens",
        )


def _loaded_bytes(checkpoint: Checkpoint, dtype: torch.dtype | str) -> int:
    if not isinstance(dtype, torch.dtype):
        return checkpoint.nbytes
    return sum(header.nbytes * 8 * dtype.itemsize // DTYPE_BITS[header.dtype] for header in checkpoint.headers.values())


def _labels(models: Sequence[str]) -> list[str]:
    names = [Path(model).absolute().name if Path(model).is_dir() else model for model in models]
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return [name if counts[name] == 1 else f"{name} #{index}" for index, name in enumerate(names, 1)]


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
