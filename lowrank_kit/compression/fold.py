"""Fold a model section by section: cut every matrix to its rank, and refine each block against the dense one.

A section is a block, or what comes before or after the blocks. One is in memory at a time, and what becomes of it is
given away before the next is begun.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.compression.calibration import Calibration, dense_objective, timed
from lowrank_kit.compression.chain import Chain
from lowrank_kit.compression.evidence import finite_weights
from lowrank_kit.compression.flow import Flow, exchanged, twin
from lowrank_kit.compression.gather import Gathering, Grams, changed_grams, in_order, loss_after
from lowrank_kit.compression.objectives import OBJECTIVES, Statistics
from lowrank_kit.compression.piece import TORCH_DTYPES, Piece, cut
from lowrank_kit.compression.plan import Plan, PlannedMatrix
from lowrank_kit.compression.progress import Progress
from lowrank_kit.compression.refine import Refined, refine_block, trainable
from lowrank_kit.compression.sections import Section
from lowrank_kit.compression.statistics import gram_if_known
from lowrank_kit.compression.team import spread
from lowrank_kit.compression.texts import Texts
from lowrank_kit.layers import LOW_RANK_LAYERS
from lowrank_kit.linalg.factor import Factors, weighted_error


@dataclass
class Folded:
    """What a section, or a whole model, has become.

    Args:
        pieces: name of a matrix -> what it became.
        others: name of a parameter of the model -> what refinement made of it.
        refined: name of a stage -> how its refinement went.
        errors: name of a matrix -> relative error of its outputs on the check text; of its weights without one.
        losses: on the check text, of the dense model and the compressed one, once both have been run through.
    """

    pieces: dict[str, Piece] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    refined: dict[str, Refined] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)


class Known(Protocol):
    """What is known of the dense model's matrices beforehand."""

    def factors(self, section: str) -> dict[str, Factors]:
        """Name of a matrix -> its nested factors for the plan's objective; empty where they are not known."""

    def output_grams(self, section: str) -> dict[str, Tensor]:
        """Name of a matrix -> Gram of the gradients of its outputs; empty where they are not known."""


class Done(Protocol):
    """What earlier runs made of sections."""

    def has(self, section: Section) -> bool:
        """Whether a section is done."""

    def get(self, section: Section) -> Folded:
        """What became of one that is."""


class Fold:
    """One pass over the sections of a model.

    Args:
        plan: with settings that leave nothing open.
        sections: of `sections_of`.
        chain: the blocks of the model, to run text through; None where no text is run.
        texts: what is run; None where nothing is.
        calibration: statistics of the whole model, if there are; None gathers them section by section.
        known: what is known beforehand, if anything is.
        spill: folder for activations; None keeps them in memory.
        progress: is told of each matrix that is begun.
        seconds: what each part takes is added here.
    """

    def __init__(
        self,
        plan: Plan,
        sections: Sequence[Section],
        *,
        chain: Chain | None = None,
        texts: Texts | None = None,
        calibration: Calibration | None = None,
        known: Known | None = None,
        spill: Path | None = None,
        progress: Progress | None = None,
        seconds: dict[str, float] | None = None,
    ) -> None:
        self.plan, self.sections, self.progress = plan, sections, progress or Progress()
        self.planned = {m.stored.matrix.name: m for m in plan.matrices if m.rank is not None}
        self.chain, self.calibration, self.known = chain, calibration, known
        self.objective = OBJECTIVES[plan.settings.objective]
        self.by_block = plan.settings.refine in ("block", "both")
        self.seconds = {} if seconds is None else seconds
        self.tokens = 0
        if chain is not None:
            assert texts is not None
            flowing = {name: blocks.ids for name, blocks in texts.sets.items() if name in self._flowing()}
            changed = self._flowing() if self.objective.sequential else {"check", "refinement"}
            self.flow = Flow(chain, flowing, changed, spill)
            self.tokens = texts.calibration.num_tokens
            self.grams = Gathering(self.flow, calibration, self.objective.sequential, self.seconds)
        else:
            self.grams = Gathering(None, calibration, self.objective.sequential, self.seconds)

    def run(self, done: Done) -> Iterator[tuple[Section, Folded]]:
        """Fold section after section.

        Args:
            done: what earlier runs made of sections.

        Yields:
            What was not done yet; it is to be kept before the next is asked for.

        Raises:
            LowRankError: NaN or Inf in a matrix, an activation or a loss.
        """
        if self.chain is None:
            for section in self.sections:
                if section.stored and not done.has(section):
                    yield section, self._outside(section, self.grams.known(section))
            return
        before, *blocks, after = self.sections
        if all(done.has(section) for section in (*blocks, after)):
            return
        begun = Folded()
        if done.has(before):
            begun = done.get(before)
        elif before.stored:
            yield before, (begun := self._outside(before, self.grams.before(before)))
        for section in self._from_where_it_stopped(blocks, begun, done):
            with self.chain.inside(section.index - 1):
                found = done.get(section) if done.has(section) else None
                block, made = self._block(section, found)
                if found is None:
                    yield section, made
                self.flow.run_changed(section.index - 1, block)
            self.flow.settle()
        ended = self._outside(after, self.grams.after(after))
        ended.losses = self._losses(begun.pieces | ended.pieces)
        yield after, ended

    def _flowing(self) -> set[str]:
        names = {"check", *(["refinement"] if self.by_block else [])}
        return names | ({"calibration"} if self.calibration is None or self.objective.sequential else set())

    def _from_where_it_stopped(self, blocks: Sequence[Section], begun: Folded, done: Done) -> Sequence[Section]:
        """The blocks that text still has to go through; the streams are before the first of them."""
        finished = sum(1 for _ in itertools.takewhile(done.has, blocks))
        for place in range(finished, 0, -1):
            if self.flow.restore(place):
                return blocks[place:]
        self.flow.enter(begun.pieces)
        return blocks

    def _outside(self, section: Section, grams: Grams) -> Folded:
        """Matrices cut without regard to any that were cut before."""
        made = Folded(dict(self._cut_all(section, grams)))
        made.errors = errors_of(self.plan.checkpoint, made.pieces, grams.check)
        return made

    def _block(self, section: Section, found: Folded | None) -> tuple[nn.Module, Folded]:
        """A block as it is stored, and what became of it; the dense streams have gone through."""
        assert self.chain is not None
        index = section.index - 1
        block = self.chain.block(index)
        if found is not None:
            changed = twin(block)
            for name in self.flow.dense:
                self.flow.run_dense(name, index, block)
            _install(changed, found, section, installed=False)
            return changed, found
        changed, pieces = self._cut_block(section, block)
        made = Folded(pieces)
        if self.objective.sequential:
            self.flow.run_dense("calibration", index, block)
        if self.by_block:
            self.flow.run_dense("refinement", index, block)
        check = self.grams.inside(section, block, "check")
        if self.by_block and section.stored:
            with timed(self.seconds, "refine by block"):
                made.refined[section.path] = self._refine(section, changed)
            made.pieces = {name: piece.read_back(changed, section.prefix) for name, piece in made.pieces.items()}
            made.others = others(self.plan, changed, section.prefix)
            _install(changed, made, section, installed=True)
        self.chain.empty(index)
        made.errors = errors_of(self.plan.checkpoint, made.pieces, check)
        return changed, made

    # Cutting

    def _cut_block(self, section: Section, block: nn.Module) -> tuple[nn.Module, dict[str, Piece]]:
        """A block with its low-rank layers, and what they are; its Grams are gone afterwards."""
        assert self.chain is not None
        grams, pieces = Grams(self.grams.inside(section, block, "calibration")), {}
        if self.objective.sequential:
            changed = twin(block)
            for name, piece in self._cut_in_turn(section, block, changed, grams):
                piece.install(changed, section.prefix)
                pieces[name] = piece
            return changed, pieces
        with self.chain.emptied(section.index - 1):
            pieces = dict(self._cut_all(section, grams))
        changed = twin(block)
        for piece in pieces.values():
            piece.install(changed, section.prefix)
        return changed, pieces

    def _cut_all(self, section: Section, grams: Grams) -> Iterator[tuple[str, Piece]]:
        """Every matrix by the dense model alone."""
        settings = self.plan.settings
        objective = dense_objective(settings.objective)
        if self.calibration is not None:
            nested = self.calibration.factors(self.plan.checkpoint, objective, settings.options)
        else:
            nested = {} if self.known is None else self.known.factors(section.path)

        def piece(name: str) -> Piece:
            factors, spent = nested.get(name), 0.0
            if factors is None:
                factors, spent = self._factorize(section, name, objective, grams)
            elif self.calibration is not None:
                spent = self.calibration.matrix_seconds.get(name, 0.0)
            return self._cut(name, factors, gram_if_known(section.stored[name], grams.calibration), spent)

        return spread(section.costs, piece)

    def _cut_in_turn(
        self, section: Section, block: nn.Module, changed: nn.Module, grams: Grams
    ) -> Iterator[tuple[str, Piece]]:
        """In the order in which the block reads its inputs, each by what the matrices before it have become."""
        if not section.stored:
            return
        assert self.chain is not None
        index, streams = section.index - 1, (self.flow.dense["calibration"], self.flow.changed["calibration"])
        for group in in_order(self.chain, section, block, streams[0]):
            with timed(self.seconds, "grams of the compressed model"):
                gram, cross = changed_grams(self.chain, index, (block, changed), group[0], streams)
            costs = {unit.matrix.name: section.costs[unit.matrix.name] for unit in group}
            yield from spread(costs, partial(self._cut_changed, section, grams, gram, cross))

    def _cut_changed(self, section: Section, grams: Grams, gram: Tensor, cross: Tensor, name: str) -> Piece:
        known = Statistics(changed_gram=gram, cross=cross)
        factors, spent = self._factorize(section, name, self.plan.settings.objective, grams, known)
        return self._cut(name, factors, gram, spent)

    def _factorize(
        self, section: Section, name: str, objective: str, grams: Grams, known: Statistics | None = None
    ) -> tuple[Factors, float]:
        """Factors of full rank of one matrix, and seconds."""
        self.progress.matrix(name)
        started = time.perf_counter()
        output_gram = None
        if self.calibration is not None:
            output_gram = self.calibration.statistics[name].output_gram
        elif self.known is not None:
            output_gram = self.known.output_grams(section.path).get(name)
        known = replace(
            known or Statistics(),
            tokens=self.tokens,
            gram=gram_if_known(section.stored[name], grams.calibration),
            output_gram=output_gram,
        )
        with timed(self.seconds, "factorize"):
            weight = weight_of(self.plan.checkpoint, self.planned[name])
            factors = OBJECTIVES[objective].factorize(weight, known, self.plan.settings.options)
        return factors, time.perf_counter() - started

    def _cut(self, name: str, factors: Factors, gram: Tensor | None, spent: float) -> Piece:
        """Cut, and add the time of it to what was spent on the factors."""
        settings, planned = self.plan.settings, self.planned[name]
        started = time.perf_counter()
        piece = cut(planned, factors, gram, form=settings.form or "factors", align=settings.align)
        return replace(piece, seconds=spent + time.perf_counter() - started)

    # Refining

    def _refine(self, section: Section, changed: nn.Module) -> Refined:
        assert self.chain is not None
        settings = self.plan.settings
        text, check = ((self.flow.changed[name], self.flow.dense[name]) for name in ("refinement", "check"))
        return refine_block(
            self.chain,
            section.index - 1,
            changed,
            text,
            check,
            batch_size=settings.batch_size,
            epochs=settings.block_epochs,
            rate=settings.block_rate,
            seed=settings.seed,
            stored=stored_dtype(self.plan),
        )

    def _losses(self, pieces: Mapping[str, Piece]) -> dict[str, float]:
        assert self.chain is not None
        ids, losses = self.flow.texts["check"], {}
        with self.chain.leaving():
            losses["loss_dense"] = loss_after(self.chain, ids, self.flow.dense["check"])
            with exchanged(self.chain.model, pieces):
                losses["loss_compressed"] = loss_after(self.chain, ids, self.flow.changed["check"])
        return losses


def weight_of(checkpoint: Checkpoint, planned: PlannedMatrix) -> Tensor:
    """W [out, in], or of experts [E, out, in], as it is on disk.

    Raises:
        LowRankError: NaN or Inf in it.
    """
    ((_, W),) = finite_weights(checkpoint, [planned.stored])
    return W


def errors_of(checkpoint: Checkpoint, pieces: Mapping[str, Piece], grams: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of the outputs of each matrix, of its weights where there is no Gram for it.

    Args:
        checkpoint: of the dense model.
        pieces: name -> what the matrix became.
        grams: `Matrix.shares_input` -> Gram on text that the factors were not made for.
    """

    def error(name: str) -> float:
        planned = pieces[name].planned
        W, gram = weight_of(checkpoint, planned), gram_if_known(planned.stored, grams)
        return weighted_error(W, pieces[name].dense(), gram)

    return dict(spread({name: piece.planned.numbers_before for name, piece in pieces.items()}, error))


def stored_dtype(plan: Plan) -> torch.dtype:
    """dtype in which factors are stored; the narrowest, should there be several."""
    planned = (TORCH_DTYPES[one.dtype] for one in plan.matrices if one.rank is not None)
    return min(planned, key=lambda dtype: dtype.itemsize)


def others(plan: Plan, module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """What was trained outside of the low-rank layers' factors, as it will be stored: norms, and biases of all layers.

    Args:
        plan: which layers there are.
        module: the model, or a part of it.
        prefix: what names begin with before their path in the part.
    """
    layers = [name for name, layer in module.named_modules() if isinstance(layer, LOW_RANK_LAYERS)]
    factors = {f"{name}.{leaf}{weight}" for name in layers for leaf in "ABC" for weight in (".weight", "")}
    on_disk, headers = plan.checkpoint.disk_names(), plan.checkpoint.headers
    found = {}
    for name, parameter in trainable(module).items():
        if name in factors:
            continue
        disk = on_disk.get(f"{prefix}{name}")
        dtype = TORCH_DTYPES[headers[disk].dtype] if disk is not None else stored_dtype(plan)
        found[f"{prefix}{name}"] = parameter.detach().to("cpu", dtype)
    return found


def _install(block: nn.Module, made: Folded, section: Section, *, installed: bool) -> None:
    """Make a block, with its low-rank layers or still without, what it is stored as."""
    for piece in made.pieces.values():
        if installed:
            piece.put_back(block, section.prefix)
        else:
            piece.install(block, section.prefix)
    parameters = dict(block.named_parameters())
    with torch.no_grad():
        for name, tensor in made.others.items():
            parameters[section.inside(name)].copy_(tensor)
