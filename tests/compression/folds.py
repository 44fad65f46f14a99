"""Plans and calibrations of tiny models of many families, on random tokens: they have no tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.loading import load_model
from lowrank_kit.checkpoint.partial import PartialModel
from lowrank_kit.compression.calibration import Calibration
from lowrank_kit.compression.chain import Chain, block_paths
from lowrank_kit.compression.evidence import foldable
from lowrank_kit.compression.fold import Fold, Folded
from lowrank_kit.compression.objectives import OBJECTIVES
from lowrank_kit.compression.plan import Plan, make_plan
from lowrank_kit.compression.sections import Section, sections_of
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.statistics import input_grams, input_grams_and_loss, output_grams, statistics_of
from lowrank_kit.compression.texts import Texts
from lowrank_kit.compression.whole import refine_whole
from lowrank_kit.data.blocks import TokenBlocks
from tests.families import token_ids

CPU = torch.device("cpu")
LENGTH = 16


def blocks_of(count: int, seed: int) -> TokenBlocks:
    return TokenBlocks(token_ids(count, LENGTH, seed).int(), 1.0)


def settings_of(**given: Any) -> CompressSettings:
    return CompressSettings(**({"keep": 0.5, "batch_size": 4, "block_tokens": LENGTH} | given)).with_defaults()


def calibration_of(folder: Path, settings: CompressSettings, *, blocks: int = 20) -> Calibration:
    """As `calibrate` makes it."""
    model = load_model(Checkpoint.open(folder), device=CPU, dtype=torch.float32)
    units = foldable(Checkpoint.open(folder))
    matrices = [matrix for unit in units for matrix in unit.matrices]
    texts = Texts("random", blocks_of(blocks, 1), blocks_of(blocks, 2), blocks_of(6, 3), (), "")
    grams = input_grams(model, matrices, texts.calibration)
    outputs = output_grams(model, matrices, texts.calibration) if settings.needs_curvature else {}
    tokens = texts.calibration.num_tokens
    statistics = {unit.matrix.name: statistics_of(unit, tokens, grams, outputs) for unit in units}
    check_grams, check_loss = input_grams_and_loss(model, matrices, texts.check)
    return Calibration(folder, texts, statistics, check_grams, check_loss, {})


def folded(folder: Path, dtype: torch.dtype = torch.float64, **given: Any) -> tuple[Plan, Calibration, Folded]:
    """Plan, calibrate and fold, with blocks run in `dtype`."""
    settings = settings_of(**given)
    plan, calibration = make_plan(Checkpoint.open(folder), settings), calibration_of(folder, settings)
    return plan, calibration, fold(plan, calibration, dtype=dtype)


class InMemory(dict[int, Folded]):
    """What became of sections, by their index."""

    def has(self, section: Section) -> bool:
        return section.index in self

    def get(self, section: Section) -> Folded:  # type: ignore[override]
        return self[section.index]


def fold(plan: Plan, calibration: Calibration | None, *, dtype: torch.dtype = torch.float32) -> Folded:
    """Fold a whole model in memory."""
    settings, whole, chain = plan.settings, Folded(), None
    planned = [m.stored for m in plan.matrices if m.rank is not None]
    if not planned:
        return whole
    paths = block_paths(stored.matrix for stored in plan.checkpoint.matrices())
    texts = None if calibration is None else calibration.texts
    if OBJECTIVES[settings.objective].sequential or settings.refine in ("block", "both"):
        assert texts is not None
        wanted = dtype if settings.refine == "none" else torch.float32
        parts = PartialModel(plan.checkpoint, device=CPU, dtype=wanted)
        chain = Chain(parts.model, paths, texts.calibration.ids, batch_size=settings.batch_size, parts=parts)
    done, sections = InMemory(), sections_of(planned, paths, chain)
    for section, made in Fold(plan, sections, chain=chain, texts=texts, calibration=calibration).run(done):
        done[section.index] = made
    folded = list(done.values())
    if settings.refine in ("e2e", "both"):
        assert texts is not None
        folded.append(refine_whole(plan, list(folded), texts, device=CPU, seconds={}))
    for made in folded:
        whole.pieces |= made.pieces
        whole.others |= made.others
        whole.refined |= made.refined
        whole.errors |= made.errors
    return whole
