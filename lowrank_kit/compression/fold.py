"""Fold a model: every matrix cut to its rank, by itself or block after block, and refined against the dense model.

Shape legend: N sequences, T tokens, D hidden, I in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lowrank_kit.checkpoint.loading import load_model
from lowrank_kit.compression.calibration import Calibration, dense_objective, factorize, refuse_non_finite
from lowrank_kit.compression.chain import Chain, block_paths, read_input
from lowrank_kit.compression.objectives import OBJECTIVES, Statistics
from lowrank_kit.compression.piece import Piece, cut
from lowrank_kit.compression.plan import Plan, PlannedMatrix
from lowrank_kit.compression.refine import Refined, refine_block, refine_end_to_end, trainable
from lowrank_kit.errors import LowRankError
from lowrank_kit.layers import LOW_RANK_LAYERS
from lowrank_kit.linalg.gram import add_gram_, at_least_float32, mirrored


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
    if not by_block:
        folded.pieces = _cut_all(plan, calibration)
    if settings.refine == "none" and not by_block:
        return folded
    assert calibration is not None
    wanted = dtype if settings.refine == "none" else torch.float32
    model = load_model(plan.checkpoint, device=device, dtype=wanted)
    if by_block:
        _fold_blocks(model, plan, calibration, folded)
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
    """Every matrix by itself; the factorizations of a calibration are kept for other plans."""
    settings, planned = plan.settings, _planned(plan)
    if calibration is None:
        found = factorize(plan.checkpoint, settings.objective, settings.options, {})
        return {name: _cut(planned[name], factors, None, plan) for name, factors in found if name in planned}
    nested = calibration.factors(plan.checkpoint, settings.objective, settings.options)
    with calibration.timed("cut"):
        return {name: _cut(one, nested[name], calibration.statistics[name], plan) for name, one in planned.items()}


def _cut(planned: PlannedMatrix, factors: Any, statistics: Statistics | None, plan: Plan) -> Piece:
    assert plan.settings.form is not None
    gram = statistics.gram if statistics is not None else None
    return cut(planned, factors, gram, form=plan.settings.form)


def _fold_blocks(model: PreTrainedModel, plan: Plan, calibration: Calibration, folded: Folded) -> None:
    """Block after block: what the dense and the compressed blocks before give is what the next is made for."""
    settings, planned = plan.settings, _planned(plan)
    sequential = OBJECTIVES[settings.objective].sequential
    outside = {name: one for name, one in planned.items() if one.stored.matrix.block is None}
    for name, piece in _cut_densely(outside, plan, calibration):
        folded.pieces[name] = piece
    paths = block_paths(stored.matrix for stored in plan.checkpoint.matrices())
    texts = calibration.texts
    chain = Chain(model, paths, texts.calibration.ids, batch_size=settings.batch_size)
    streams = {"calibration": _Stream(chain, texts.calibration.ids)} if sequential else {}
    if settings.refine in ("block", "both"):
        assert texts.refinement is not None
        streams |= {"text": _Stream(chain, texts.refinement.ids), "check": _Stream(chain, texts.check.ids)}
    for index, path in enumerate(tqdm(paths, desc="fold", unit="block", disable=None)):
        block = model.get_submodule(path)
        dense = copy.deepcopy(block)
        here = {name: one for name, one in planned.items() if name.startswith(f"{path}.")}
        pieces = (
            _cut_in_turn(chain, index, block, dense, here, plan, calibration, streams["calibration"])
            if sequential
            else _cut_densely(here, plan, calibration)
        )
        for name, piece in pieces:
            piece.install(model)
            folded.pieces[name] = piece
        for stream in streams.values():
            stream.dense_outputs = chain.run_all(index, dense, stream.dense)
        if "text" in streams and here:
            with calibration.timed("refine by block"):
                folded.refined[path] = refine_block(
                    chain,
                    index,
                    block,
                    (streams["text"].changed, streams["text"].dense_outputs),
                    (streams["check"].changed, streams["check"].dense_outputs),
                    epochs=settings.block_epochs,
                    rate=settings.block_rate,
                    seed=settings.seed,
                )
        for stream in streams.values():
            stream.advance(index, block)
    for name in outside:
        folded.pieces[name].install(model)


class _Stream:
    """What the dense blocks and the compressed ones give for a text."""

    def __init__(self, chain: Chain, ids: Tensor) -> None:
        self.chain = chain
        self.dense = self.changed = self.dense_outputs = chain.enter(ids)

    def advance(self, index: int, block: nn.Module) -> None:
        """Past a block whose dense outputs are there."""
        self.changed = self.chain.run_all(index, block, self.changed)
        self.dense = self.dense_outputs


def _cut_densely(
    planned: dict[str, PlannedMatrix], plan: Plan, calibration: Calibration
) -> Iterator[tuple[str, Piece]]:
    """By the statistics of the dense model."""
    settings = plan.settings
    nested = calibration.factors(plan.checkpoint, dense_objective(settings.objective), settings.options)
    for name, one in planned.items():
        yield name, _cut(one, nested[name], calibration.statistics[name], plan)


def _cut_in_turn(
    chain: Chain,
    index: int,
    block: nn.Module,
    dense: nn.Module,
    planned: dict[str, PlannedMatrix],
    plan: Plan,
    calibration: Calibration,
    stream: _Stream,
) -> Iterator[tuple[str, Piece]]:
    """In the order in which the block reads its inputs, each by what the matrices before it have become."""
    settings = plan.settings
    path = chain.paths[index]
    groups: dict[str, list[PlannedMatrix]] = {}
    for one in planned.values():
        groups.setdefault(one.stored.matrix.shares_input, []).append(one)
    for group in _in_order(chain, index, dense, list(groups.values()), stream.dense):
        reader = group[0].stored.matrix.name.removeprefix(f"{path}.")
        with calibration.timed("grams of the compressed model"):
            gram, cross = _changed_grams(chain, index, block, dense, reader, stream)
        for one in group:
            name = one.stored.matrix.name
            ((_, tensor),) = plan.checkpoint.tensors([one.stored.tensors[0]])
            refuse_non_finite(plan.checkpoint, one.stored.tensors[0], tensor)
            known = replace(calibration.statistics[name], changed_gram=gram, cross=cross)
            with calibration.timed("factorize"):
                method = OBJECTIVES[settings.objective]
                factors = method.factorize(one.stored.weight(tensor), known, settings.options)
                piece = cut(one, factors, gram, form=settings.form or "factors")
            yield name, piece


def _in_order(
    chain: Chain, index: int, dense: nn.Module, groups: list[list[PlannedMatrix]], hidden_NTD: Tensor
) -> list[list[PlannedMatrix]]:
    """Groups of matrices with one input each, as the block comes to them."""
    path = chain.paths[index]
    seen: list[str] = []
    handles = [
        dense.get_submodule(group[0].stored.matrix.name.removeprefix(f"{path}.")).register_forward_pre_hook(
            lambda module, args, key=group[0].stored.matrix.shares_input: seen.append(key)
        )
        for group in groups
    ]
    chain.run_all(index, dense, hidden_NTD[:1])
    for handle in handles:
        handle.remove()
    unread = [group[0].stored.matrix.name for group in groups if group[0].stored.matrix.shares_input not in seen]
    if unread:
        raise LowRankError(f"the calibration text does not reach {unread[0]}", hint="more text: --calibration-blocks")
    return sorted(groups, key=lambda group: seen.index(group[0].stored.matrix.shares_input))


def _changed_grams(
    chain: Chain, index: int, block: nn.Module, dense: nn.Module, reader: str, stream: _Stream
) -> tuple[Tensor, Tensor]:
    """Y Y^T and X Y^T of what a module reads in the dense block (X) and in the compressed one (Y), [I, I] float64."""
    gram = cross = None
    inputs = zip(
        read_input(chain, index, dense, reader, stream.dense),
        read_input(chain, index, block, reader, stream.changed),
        strict=True,
    )
    for x, y in inputs:
        x_NI, y_NI = at_least_float32(x.flatten(0, -2)), at_least_float32(y.flatten(0, -2))
        if gram is None or cross is None:
            gram = torch.zeros(y_NI.shape[1], y_NI.shape[1], dtype=torch.float64, device=y.device)
            cross = torch.zeros_like(gram)
        add_gram_(gram, y_NI)
        cross += x_NI.mT @ y_NI
    assert gram is not None
    assert cross is not None
    if not (gram.diagonal().isfinite().all() and cross.isfinite().all()):
        raise LowRankError(
            f"NaN or Inf in the input of {chain.paths[index]}.{reader} of the compressed model",
            hint="a higher budget, or --objective whiten",
        )
    return mirrored(gram).cpu(), cross.cpu()


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
        )


def _others(model: PreTrainedModel) -> dict[str, Tensor]:
    """What was trained outside of the low-rank layers' matrices, biases of these layers included."""
    layers = [name for name, module in model.named_modules() if isinstance(module, LOW_RANK_LAYERS)]
    factors = {f"{name}.{leaf}.weight" for name in layers for leaf in "ABC"}
    return {name: p.detach().cpu() for name, p in trainable(model).items() if name not in factors}
