"""The costly part of a compression: text, what is to be known, ranks, and what becomes of every section."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.partial import NotInPartsError, PartialModel
from lowrank_kit.compression.allocation import Evidence
from lowrank_kit.compression.calibration import Calibration, calibrate, draw, inputs_evidence, loss_evidence, timed
from lowrank_kit.compression.chain import Chain, NoChainError, block_paths
from lowrank_kit.compression.evidence import foldable, weight_evidence
from lowrank_kit.compression.fold import Fold, Folded
from lowrank_kit.compression.objectives import OBJECTIVES
from lowrank_kit.compression.plan import Plan, make_plan
from lowrank_kit.compression.progress import Progress
from lowrank_kit.compression.sections import BEFORE, Section, sections_of
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.survey import Survey, SurveyFiles
from lowrank_kit.compression.texts import Texts
from lowrank_kit.compression.whole import refine_whole
from lowrank_kit.compression.work import Kept, WorkFolder
from lowrank_kit.processes import check_same, is_first

logger = logging.getLogger(__name__)


class Job:
    """What a compression does between its settings and its files.

    Args:
        checkpoint: of the dense model.
        settings: with nothing left open.
        needed: of `evidence_needed`.
        work: where what is done is kept.
        calibration: of the whole model, if there is one.
        device: where text is run.
        dtype: of the runs, but for refinement.

    Raises:
        UsageError: too little text, or a tokenizer that is not the model's.
        ValueError: a calibration of another model, or without refinement text where that is wanted.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: CompressSettings,
        needed: str,
        work: WorkFolder,
        *,
        calibration: Calibration | None,
        device: torch.device,
        dtype: torch.dtype | str,
    ) -> None:
        self.checkpoint, self.settings, self.needed, self.work = checkpoint, settings, needed, work
        self.device, self.dtype = device, dtype if settings.refine == "none" else torch.float32
        self.objective = OBJECTIVES[settings.objective]
        self.progress = Progress(work.log if is_first() else None, device, quiet=not is_first())
        self.survey: SurveyFiles | None = None
        self.texts, self.calibration = self._texts(calibration)
        check_same({} if self.texts is None else {f"{n} text": b.sha256 for n, b in self.texts.sets.items()})
        # Its own clock: what another compression took is not to be in this one's report.
        self.seconds = dict(self.calibration.seconds) if self.calibration is not None else {}

    def _texts(self, calibration: Calibration | None) -> tuple[Texts | None, Calibration | None]:
        settings = self.settings
        if calibration is not None and calibration.model != self.checkpoint.path:
            raise ValueError(f"the calibration is of {calibration.model}, not of {self.checkpoint.path}")
        if calibration is not None and settings.refine != "none" and calibration.texts.refinement is None:
            raise ValueError("the calibration has no refinement text: calibrate with settings that refine")
        wanted = self.objective.needs_text or self.needed in ("inputs", "loss") or settings.refine != "none"
        if not wanted:
            return None, None
        if calibration is not None:
            return calibration.texts, replace(calibration, seconds=dict(calibration.seconds))
        return (None if self._all_dense() else draw(self.checkpoint, settings)), None

    def _all_dense(self) -> bool:
        """Whether the budget leaves nothing to do."""
        if self.needed != "nothing":
            return False
        uniform = replace(self.settings, allocation="uniform")
        return all(m.rank is None for m in make_plan(self.checkpoint, uniform).matrices)

    @property
    def by_block(self) -> bool:
        """Whether a block is made by what the compressed blocks before it give."""
        return self.objective.sequential or self.settings.refine in ("block", "both")

    @cached_property
    def blocks(self) -> list[str]:
        """Paths of the blocks."""
        return block_paths(stored.matrix for stored in self.checkpoint.matrices())

    @cached_property
    def chain(self) -> Chain | None:
        """The blocks, filled one at a time; None where no text is run through them.

        A model whose blocks are no chain is calibrated as a whole instead, where that is enough.
        """
        if self.texts is None or (self.calibration is not None and not self.by_block):
            return None
        ids, batch = self.texts.calibration.ids, self.settings.batch_size
        try:
            parts = PartialModel(self.checkpoint, device=self.device, dtype=self.dtype)
            return Chain(parts.model, self.blocks, ids, batch_size=batch, parts=parts)
        except (NoChainError, NotInPartsError) as error:
            if self.by_block:
                raise
            logger.warning("%s, and the model has to be in memory as a whole", error.message)
        self.calibration = calibrate(
            self.checkpoint, self.settings, texts=self.texts, device=str(self.device), dtype=_name(self.dtype)
        )
        self.seconds = self.calibration.seconds
        return None

    def plan(self, spill: Path | None) -> tuple[Plan, dict[str, Evidence] | None]:
        """Ranks, and the evidence for them.

        Args:
            spill: folder for activations; None keeps them in memory.
        """
        evidence = self._evidence(spill)
        return make_plan(self.checkpoint, self.settings, evidence), evidence

    def _evidence(self, spill: Path | None) -> dict[str, Evidence] | None:
        chain = self.chain
        if chain is not None and self.calibration is None and (self.needed in ("inputs", "loss") or self._curved):
            assert self.texts is not None
            survey = Survey(
                self.checkpoint,
                self.settings,
                self.needed,
                chain=chain,
                sections=sections_of(foldable(self.checkpoint, self.settings), self.blocks, chain),
                ids=self.texts.calibration.ids,
                folder=self.work.survey,
                spill=spill,
                progress=self.progress,
            )
            with timed(self.seconds, "survey"):
                self.survey = survey.run()
        if self.needed == "nothing":
            return None
        if self.needed == "weights":
            return weight_evidence(self.checkpoint)
        if self.survey is not None:
            return self.survey.evidence
        assert self.calibration is not None
        if self.needed == "inputs":
            return inputs_evidence(self.calibration, self.checkpoint)
        return loss_evidence(self.calibration, self.checkpoint, self.settings.objective, self.settings.options)

    @property
    def _curved(self) -> bool:
        return self.settings.needs_curvature

    def fold(self, plan: Plan, spill: Path | None) -> Kept:
        """What became of every section, kept in the work folder.

        Args:
            plan: of `plan`.
            spill: folder for activations; None keeps them in memory.
        """
        planned = {m.stored.matrix.name: m for m in plan.matrices if m.rank is not None}
        chain = self.chain if planned else None
        sections = sections_of([m.stored for m in planned.values()], self.blocks, chain)
        kept = Kept(self.work, planned, sections)
        folding = Fold(
            plan,
            sections,
            chain=chain,
            texts=self.texts,
            calibration=self.calibration,
            known=self.survey,
            spill=spill,
            progress=self.progress,
            seconds=self.seconds,
        )
        wanted = [section for section in sections if section.stored or (chain is not None and section.path != BEFORE)]
        with self.progress.stage("fold", len(wanted), sum(kept.has(section) for section in wanted)):
            for section, made in folding.run(kept):
                kept.keep(section, made)
                self.progress.section(section.path, rows_of(made))
        if planned and self.settings.refine in ("e2e", "both"):
            self._refine(plan, kept, len(sections))
        return kept

    def _refine(self, plan: Plan, kept: Kept, index: int) -> None:
        whole = Section(index, "end to end", {})
        kept.add(whole)
        if kept.has(whole):
            return
        assert self.texts is not None
        folded = [kept.get(section) for section in kept.sections]
        made = refine_whole(plan, folded, self.texts, device=self.device, seconds=self.seconds)
        kept.keep(whole, made)


def rows_of(made: Folded) -> list[dict[str, object]]:
    """What is told of each matrix of a section."""
    return [
        {
            "matrix": name,
            "rank": piece.planned.rank,
            "form": piece.planned.form,
            "error": made.errors.get(name),
            "seconds": round(piece.seconds, 3),
        }
        for name, piece in made.pieces.items()
    ]


def _name(dtype: torch.dtype | str) -> str:
    return dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
