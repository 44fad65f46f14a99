"""Fold a model: every matrix cut to its rank, by itself or block after block, and refined against the dense model.

Shape legend: N sequences, T tokens, D hidden, I in.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lowrank_kit.checkpoint.loading import load_model
from lowrank_kit.compression.calibration import Calibration, dense_objective, factorize
from lowrank_kit.compression.chain import Chain, block_paths, read_input
from lowrank_kit.compression.evidence import refuse_non_finite
from lowrank_kit.compression.objectives import OBJECTIVES
from lowrank_kit.compression.piece import TORCH_DTYPES, Piece, cut
from lowrank_kit.compression.plan import Plan, PlannedMatrix
from lowrank_kit.compression.refine import Refined, refine_block, refine_end_to_end, trainable
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import LowRankError
from lowrank_kit.layers import LOW_RANK_LAYERS
from lowrank_kit.linalg.factor import Factors
from lowrank_kit.linalg.gram import add_gram_, at_least_float32, mirrored, zero_gram


@dataclass
class Folded:
    """What a folding made.

    Args:
        pieces: name of a matrix -> what it became.
        others: name of a parameter of the model -> what refinement made of it.
        refined: name of a stage -> how its refinement went.
    """

    pieces: dict[str, Piece] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    refined: dict[str, Refined] = field(default_factory=dict)


def fold(plan: Plan, calibration: Calibration | None, *, device: torch.device, dtype: torch.dtype | str) -> Folded:
    """Cut every matrix of a plan to its rank, and refine if the settings say so.

    Args:
        plan: with settings that leave nothing open.
        calibration: of the same model; None for an objective that needs none, without refinement.
        device: where blocks are run.
        dtype: number format of the runs; refinement trains in float32 or better.

    Raises:
        LowRankError: NaN or Inf in a matrix, an activation or a loss; blocks that are no chain.
    """
    settings = plan.settings
    sequential = OBJECTIVES[settings.objective].sequential
    by_block = sequential or settings.refine in ("block", "both")
    folded = Folded()
    if not _planned(plan):
        return folded
    if not by_block:
        folded.pieces = _cut_all(plan, calibration)
        if settings.refine == "none":
            return folded
    assert calibration is not None
    wanted = dtype if settings.refine == "none" else torch.float32
    model = load_model(plan.checkpoint, device=device, dtype=wanted)
    if by_block:
        _BlockFold(model, plan, calibration, folded).run()
    else:
        for piece in folded.pieces.values():
            piece.install(model)
    if settings.refine in ("e2e", "both"):
        _refine_all(model, plan, calibration, folded, device)
    if settings.refine != "none":
        folded.pieces = {name: piece.read_back(model) for name, piece in folded.pieces.items()}
        folded.others = _others(model)
    return folded


def _planned(plan: Plan) -> dict[str, PlannedMatrix]:
    return {m.stored.matrix.name: m for m in plan.matrices if m.rank is not None}


def _cut_all(plan: Plan, calibration: Calibration | None) -> dict[str, Piece]:
    """Every matrix by itself."""
    planned, settings = _planned(plan), plan.settings
    if calibration is not None:
        with calibration.timed("cut"):
            return dict(_cut_by_dense(planned, plan, calibration))
    found = factorize(plan.checkpoint, settings.objective, settings.options, {})
    return {
        name: _cut(planned[name], factors, None, settings, seconds)
        for name, factors, seconds in found
        if name in planned
    }


def _cut_by_dense(
    planned: dict[str, PlannedMatrix], plan: Plan, calibration: Calibration
) -> Iterator[tuple[str, Piece]]:
    """By the statistics of the dense model, whose factorizations are kept for other plans."""
    settings = plan.settings
    nested = calibration.factors(plan.checkpoint, dense_objective(settings.objective), settings.options)
    for name, one in planned.items():
        spent = calibration.matrix_seconds.get(name, 0.0)
        yield name, _cut(one, nested[name], calibration.statistics[name].gram, settings, spent)


def _cut(
    planned: PlannedMatrix, factors: Factors, gram_II: Tensor | None, settings: CompressSettings, spent: float
) -> Piece:
    """Cut, and add the time of it to what was spent on the factors."""
    started = time.perf_counter()
    piece = cut(planned, factors, gram_II, form=settings.form or "factors", align=settings.align)
    return replace(piece, seconds=spent + time.perf_counter() - started)


class _BlockFold:
    """Block after block: what the dense and the compressed blocks before give is what the next is made for."""

    def __init__(self, model: PreTrainedModel, plan: Plan, calibration: Calibration, folded: Folded) -> None:
        settings, texts = plan.settings, calibration.texts
        self.model, self.plan, self.calibration, self.folded = model, plan, calibration, folded
        self.planned = _planned(plan)
        self.sequential = OBJECTIVES[settings.objective].sequential
        paths = block_paths(stored.matrix for stored in plan.checkpoint.matrices())
        self.chain = Chain(model, paths, texts.calibration.ids, batch_size=settings.batch_size)
        self.streams = {"calibration": _Stream(self.chain, texts.calibration.ids)} if self.sequential else {}
        if settings.refine in ("block", "both"):
            assert texts.refinement is not None
            self.streams["text"] = _Stream(self.chain, texts.refinement.ids)
            self.streams["check"] = _Stream(self.chain, texts.check.ids)

    def run(self) -> None:
        """Cut every matrix, and refine every block if the settings say so."""
        outside = {name: one for name, one in self.planned.items() if one.stored.matrix.block is None}
        if outside:
            self._install(_cut_by_dense(outside, self.plan, self.calibration))
            for stream in self.streams.values():
                stream.enter_changed()
        for index in tqdm(range(len(self.chain.paths)), desc="fold", unit="block", disable=None):
            self._fold_block(index)

    def _fold_block(self, index: int) -> None:
        path = self.chain.paths[index]
        block = self.model.get_submodule(path)
        dense = copy.deepcopy(block)
        here = {name: one for name, one in self.planned.items() if name.startswith(f"{path}.")}
        if self.sequential:
            self._install(self._cut_in_turn(index, block, dense, here))
        else:
            self._install(_cut_by_dense(here, self.plan, self.calibration))
        targets = {name: self.chain.run_all(index, dense, stream.dense) for name, stream in self.streams.items()}
        if "text" in self.streams and here:
            self._refine(index, block, targets)
        for name, stream in self.streams.items():
            stream.dense = targets[name]
            stream.changed = self.chain.run_all(index, block, stream.changed)

    def _install(self, pieces: Iterator[tuple[str, Piece]]) -> None:
        for name, piece in pieces:
            piece.install(self.model)
            self.folded.pieces[name] = piece

    def _cut_in_turn(
        self, index: int, block: nn.Module, dense: nn.Module, planned: dict[str, PlannedMatrix]
    ) -> Iterator[tuple[str, Piece]]:
        """In the order in which the block reads its inputs, each by what the matrices before it have become."""
        settings, stream = self.plan.settings, self.streams["calibration"]
        method = OBJECTIVES[settings.objective]
        for group in _in_order(self.chain, index, dense, planned, stream.dense):
            with self.calibration.timed("grams of the compressed model"):
                gram, cross = _changed_grams(self.chain, index, block, dense, group[0], stream)
            for name in group:
                stored = planned[name].stored
                ((on_disk, tensor),) = self.plan.checkpoint.tensors(stored.tensors)
                refuse_non_finite(self.plan.checkpoint, on_disk, tensor)
                known = replace(self.calibration.statistics[name], changed_gram=gram, cross=cross)
                started = time.perf_counter()
                with self.calibration.timed("factorize"):
                    factors = method.factorize(stored.weight(tensor), known, settings.options)
                yield name, _cut(planned[name], factors, gram, settings, time.perf_counter() - started)

    def _refine(self, index: int, block: nn.Module, targets: dict[str, Tensor]) -> None:
        settings = self.plan.settings
        text, check = ((self.streams[name].changed, targets[name]) for name in ("text", "check"))
        with self.calibration.timed("refine by block"):
            self.folded.refined[self.chain.paths[index]] = refine_block(
                self.chain,
                index,
                block,
                text,
                check,
                epochs=settings.block_epochs,
                rate=settings.block_rate,
                seed=settings.seed,
                stored=_stored_dtype(self.plan),
            )


class _Stream:
    """What the next block reads of a text: `dense` in the dense model, `changed` in the compressed one."""

    def __init__(self, chain: Chain, ids: Tensor) -> None:
        self.chain, self.ids = chain, ids
        self.dense = self.changed = chain.enter(ids)

    def enter_changed(self) -> None:
        """Anew, by what is compressed before the first block."""
        self.changed = self.chain.enter(self.ids)


def _in_order(
    chain: Chain, index: int, dense: nn.Module, planned: dict[str, PlannedMatrix], hidden_NTD: Tensor
) -> list[list[str]]:
    """Names of matrices, those with one input together, as the block comes to them."""
    groups: dict[str, list[str]] = {}
    for name, one in planned.items():
        groups.setdefault(one.stored.matrix.shares_input, []).append(name)
    seen: list[str] = []
    handles = [
        dense.get_submodule(_inside(chain, index, group[0])).register_forward_pre_hook(
            lambda module, args, key=key: seen.append(key)
        )
        for key, group in groups.items()
    ]
    chain.run_all(index, dense, hidden_NTD[:1])
    for handle in handles:
        handle.remove()
    if unread := [group[0] for key, group in groups.items() if key not in seen]:
        raise LowRankError(f"the calibration text does not reach {unread[0]}", hint="more text: --calibration-blocks")
    return [groups[key] for key in dict.fromkeys(seen)]


def _changed_grams(
    chain: Chain, index: int, block: nn.Module, dense: nn.Module, reader: str, stream: _Stream
) -> tuple[Tensor, Tensor]:
    """Y Y^T and X Y^T of what a matrix reads in the dense block (X) and in the compressed one (Y), [I, I] float64."""
    path = _inside(chain, index, reader)
    gram = cross = None
    inputs = zip(
        read_input(chain, index, dense, path, stream.dense),
        read_input(chain, index, block, path, stream.changed),
        strict=True,
    )
    for x, y in inputs:
        x_NI, y_NI = at_least_float32(x.flatten(0, -2)), at_least_float32(y.flatten(0, -2))
        if gram is None or cross is None:
            gram = zero_gram(y_NI.shape[1], y.device)
            cross = torch.zeros_like(gram)
        add_gram_(gram, y_NI)
        cross += x_NI.mT @ y_NI
    assert gram is not None
    assert cross is not None
    if not (gram.diagonal().isfinite().all() and cross.isfinite().all()):
        raise LowRankError(
            f"NaN or Inf in the input of {reader} of the compressed model",
            hint="a higher budget, or --objective whiten",
        )
    return mirrored(gram).cpu(), cross.cpu()


def _inside(chain: Chain, index: int, name: str) -> str:
    """Path of a module of the model in its block."""
    return name.removeprefix(f"{chain.paths[index]}.")


def _refine_all(
    model: PreTrainedModel, plan: Plan, calibration: Calibration, folded: Folded, device: torch.device
) -> None:
    settings, texts = plan.settings, calibration.texts
    assert texts.refinement is not None
    dense = load_model(plan.checkpoint, device=device, dtype=torch.float32)
    with calibration.timed("refine end to end"):
        folded.refined["end to end"] = refine_end_to_end(
            model,
            dense,
            texts.refinement.ids,
            texts.check.ids,
            epochs=settings.e2e_epochs,
            rate=settings.e2e_rate,
            batch_size=settings.batch_size,
            seed=settings.seed,
            stored=_stored_dtype(plan),
        )


def _stored_dtype(plan: Plan) -> torch.dtype:
    """dtype in which factors are stored; the narrowest, should there be several."""
    return min((TORCH_DTYPES[one.dtype] for one in _planned(plan).values()), key=lambda dtype: dtype.itemsize)


def _others(model: PreTrainedModel) -> dict[str, Tensor]:
    """What was trained outside of the low-rank layers' matrices, biases of these layers included."""
    layers = [name for name, module in model.named_modules() if isinstance(module, LOW_RANK_LAYERS)]
    factors = {f"{name}.{leaf}.weight" for name in layers for leaf in "ABC"}
    return {name: p.detach().cpu() for name, p in trainable(model).items() if name not in factors}
