"""Choose what is left open: the best that the time and the memory allow, and say why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.calibration import default_block_tokens
from lowrank_kit.compression.needs import estimate_needs
from lowrank_kit.compression.objectives import OBJECTIVES
from lowrank_kit.compression.settings import AUTO, CompressSettings
from lowrank_kit.compression.targets import foldable, targeted
from lowrank_kit.config import from_dict, to_dict
from lowrank_kit.device import available_memory, product_flops
from lowrank_kit.report.tables import duration

# Seconds that auto plans for where --time says nothing.
DEFAULT_SECONDS = 30 * 60
# Share of the speed of large products that a model's forward and backward pass reach, as `lowrank train` measured it;
# and decompositions, whose arithmetic is 25 S^3 for a symmetric matrix of side S (LAPACK's syevd with vectors).
PASS_SHARE, DECOMPOSITION_SHARE, DECOMPOSITION_WORK = 0.5, 0.1, 25
# Work of the stages in forward passes over their text: Grams with a forward pass; a forward and a backward pass for
# activations, and Grams of outputs; four inputs of a block read in two models; a step, its backward pass and the dense
# model's part. By arithmetic: on models of 0.7M parameters trainings and curvature took up to twice that.
GRAMS, CURVATURE, TWO_STREAMS, BLOCK_STEP, E2E_STEP = 1.7, 3.7, 5.0, 3.5, 4.0
# Spectra of the weights are read for a forecast if that takes no longer.
SPECTRA_SECONDS = 60


@dataclass(frozen=True)
class Choice:
    """Settings with nothing left open, and why.

    Args:
        settings: what was chosen.
        reasons: in words, one for each choice.
        stages: name of a stage -> tokens it reads and seconds it is estimated to take.
    """

    settings: CompressSettings
    reasons: tuple[str, ...]
    stages: dict[str, dict[str, float]]

    @property
    def seconds(self) -> float:
        """Estimate of all stages together."""
        return sum(stage["seconds"] for stage in self.stages.values())

    def record(self) -> dict[str, Any]:
        """For compression.json and the plan."""
        return {"reasons": list(self.reasons), "stages": self.stages, "seconds": self.seconds}

    def kept(self) -> dict[str, Any]:
        """For `of`."""
        return {"settings": to_dict(self.settings), **self.record()}

    @classmethod
    def of(cls, record: dict[str, Any]) -> Choice:
        """The choice that `kept` was asked of."""
        settings = from_dict(CompressSettings, record["settings"], "the choice of an earlier run")
        return cls(settings, tuple(record["reasons"]), record["stages"])


def choose(checkpoint: Checkpoint, settings: CompressSettings, device: torch.device) -> Choice:
    """Settle what the settings leave open.

    With an objective given, what is None is plain: uniform, factors, no refinement. With "auto" the first of
    `_candidates` that the time and the memory allow, with whatever the settings say already.

    Args:
        checkpoint: of the dense model.
        settings: with `objective` "auto" or some of allocation, form and refine None.
        device: where it will run; its speed is measured for a moment.
    """
    settings = replace(settings, block_tokens=settings.block_tokens or default_block_tokens(checkpoint))
    checkpoint = targeted(checkpoint, settings)
    machine = _Machine(checkpoint, settings, device)
    if settings.objective != AUTO:
        settled = settings.with_defaults()
        return Choice(settled, (), machine.stages(settled))
    allowed = settings.time or DEFAULT_SECONDS
    refused: list[str] = []
    for candidate, gain in _candidates(settings):
        stages = machine.stages(candidate)
        seconds = sum(stage["seconds"] for stage in stages.values())
        if (needed := machine.memory(candidate)) > machine.memory_left:
            refused.append(
                f"not {_words(candidate)}: {needed / 1e9:.1f} GB, {machine.memory_left / 1e9:.1f} GB are left"
            )
        elif seconds > allowed:
            refused.append(f"not {_words(candidate)}: {duration(seconds)}, {duration(allowed)} are allowed (--time)")
        else:
            return Choice(candidate, (f"{_words(candidate)}: {gain}", *refused[-1:]), stages)
    return Choice(candidate, (f"{_words(candidate)}: {gain}; the quickest there is", *refused[-1:]), stages)


@lru_cache
def speed(device: torch.device) -> float:
    """Arithmetic of large products a second, measured once."""
    return product_flops(device, torch.float32)


def spectra_seconds(checkpoint: Checkpoint, device: torch.device) -> float:
    """Estimate of the time that the singular values of all matrices take, with half the work of a decomposition."""
    sides = sum(unit.count * min(unit.matrix.shape) ** 3 for unit in foldable(checkpoint))
    return DECOMPOSITION_WORK * sides / (2 * DECOMPOSITION_SHARE * speed(device))


def _candidates(settings: CompressSettings) -> Iterator[tuple[CompressSettings, str]]:
    """From the best to the quickest, by evals/compressor; what the settings say already stays."""
    by_loss = replace(settings, form=settings.form or AUTO, allocation=settings.allocation or "loss")
    if settings.refine is None:
        both = replace(by_loss, refine="both", block_epochs=1)
        yield replace(both, objective="two-sided"), "the least loss of two checkpoints in three, in evals/compressor"
    for epochs in dict.fromkeys((settings.e2e_epochs, max(1, settings.e2e_epochs // 2), 1)):
        refined = replace(by_loss, refine=settings.refine or "e2e", e2e_epochs=epochs)
        yield replace(refined, objective="anchored-two-sided"), "the least loss with one training"
    if settings.refine is None:
        one_shot = replace(by_loss, refine="none")
        yield replace(one_shot, objective="anchored-two-sided"), "the least loss without training"
        yield replace(one_shot, objective="two-sided"), "the least loss without two streams"
    quick = replace(by_loss, allocation=settings.allocation or "uniform", refine=settings.refine or "none")
    yield replace(quick, objective="whiten"), "no backward pass"
    yield replace(quick, objective="plain"), "no text at all"


def _words(settings: CompressSettings) -> str:
    refine = "" if settings.refine == "none" else f", refined {settings.refine}"
    if settings.refine in ("e2e", "both"):
        refine += f" in {settings.e2e_epochs} epoch" + "s" * (settings.e2e_epochs > 1)
    return f"{settings.objective} by {settings.allocation}, form {settings.form}{refine}"


class _Machine:
    """What a model costs on a device."""

    def __init__(self, checkpoint: Checkpoint, settings: CompressSettings, device: torch.device) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.matrices = [matrix for unit in foldable(checkpoint, settings) for matrix in unit.matrices]
        self.numbers = sum(torch.Size(h.shape).numel() for h in checkpoint.headers.values())

    @cached_property
    def memory_left(self) -> int:
        return available_memory(self.device)

    def stages(self, settings: CompressSettings) -> dict[str, dict[str, float]]:
        """Tokens and seconds of each stage."""
        objective = OBJECTIVES[settings.objective]
        assert settings.block_tokens is not None
        calibration = settings.calibration_blocks * settings.block_tokens
        refinement = settings.refine_blocks * settings.block_tokens
        passes: dict[str, tuple[int, float]] = {}
        if objective.needs_text or settings.allocation in ("lagrange", "loss") or settings.refine != "none":
            passes["calibration"] = (calibration, GRAMS)
        if settings.needs_curvature:
            passes["curvature"] = (calibration, CURVATURE)
        if objective.sequential:
            passes["grams of the compressed model"] = (calibration, TWO_STREAMS)
        if settings.refine in ("block", "both"):
            passes["refine by block"] = (refinement * settings.block_epochs, BLOCK_STEP)
        if settings.refine in ("e2e", "both"):
            passes["refine end to end"] = (refinement * settings.e2e_epochs, E2E_STEP)
        per_token = 2 * self.numbers / (PASS_SHARE * speed(self.device))
        sides = sum(min(m.shape) ** 3 for m in self.matrices)
        decompositions = DECOMPOSITION_WORK * sides * (2 if objective.sequential else 1)
        stages = {
            name: {"tokens": tokens, "seconds": work * tokens * per_token} for name, (tokens, work) in passes.items()
        }
        stages["factorize"] = {"tokens": 0, "seconds": decompositions / (DECOMPOSITION_SHARE * speed(self.device))}
        return stages

    def memory(self, settings: CompressSettings) -> int:
        """Bytes, at the peak of the largest stage."""
        return estimate_needs(self.checkpoint, settings, kept=settings.keep or 1.0).memory
