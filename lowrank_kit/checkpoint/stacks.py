"""Fused experts on disk: all experts of one weight are one thing to compress, with one rank.

Shape legend: E experts, O out, I in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_kit.checkpoint.headers import TensorHeader
from lowrank_kit.checkpoint.stored import Renaming, Source, StoredMatrix, factor_names, sources_by_parameter
from lowrank_kit.layers.experts import PROJECTIONS, sentinel_shape, why_dense
from lowrank_kit.matrices import Matrix, find_matrices

RENAMED = "experts whose factors transformers would rename"
MIXED = "experts stored in several number formats"


@dataclass(frozen=True)
class StoredStack:
    """The experts of a fused weight and the tensors that hold them on disk; has what a `StoredMatrix` has.

    Args:
        matrix: one for all: the name is that of the weight, the shape that of an expert.
        matrices: of the experts.
        tensors: names on disk: of one fused 3-D tensor, or of the parts of expert 0, of expert 1 and so on.
        disk_path: what the names of the factors on disk begin with.
        sentinels: name on disk and shape of what stands for the weight when it is factorized.
        reason: why it stays dense; "" if it need not.
    """

    matrix: Matrix
    matrices: tuple[Matrix, ...]
    tensors: tuple[str, ...]
    disk_path: str
    sentinels: tuple[tuple[str, tuple[int, ...]], ...]
    reason: str = ""

    @property
    def count(self) -> int:
        """E."""
        return len(self.matrices)

    @property
    def module(self) -> str:
        """Path of the experts."""
        return self.matrix.name.rpartition(".")[0]

    @property
    def projection(self) -> str:
        """Name of the weight in the module."""
        return self.matrix.name.rpartition(".")[2]

    @property
    def factors(self) -> str:
        """What the names of the factors begin with, after the path; of experts of another kind their own name."""
        return PROJECTIONS.get(self.projection, self.projection)

    def weight(self, *tensors: Tensor) -> Tensor:
        """W of all experts, [E, O, I], from the tensors named in `tensors`, given in that order."""
        if len(tensors) == 1 and tensors[0].ndim == 3:
            W = tensors[0]
            return W.mT if self.matrix.transposed else W
        parts = len(tensors) // self.count
        experts = [torch.cat(tensors[start : start + parts]) for start in range(0, len(tensors), parts)]
        return torch.stack(experts)


# What is compressed by itself.
Unit = StoredMatrix | StoredStack


def with_stacks(model: PreTrainedModel, headers: Mapping[str, TensorHeader], stored: list[StoredMatrix]) -> list[Unit]:
    """What can be compressed, one by one: the matrices of a dense model, the experts of a fused weight together.

    Args:
        model: the model, on the meta device.
        headers: what is on disk.
        stored: what `stored_matrices` gives.
    """
    if all(one.matrix.expert is None for one in stored):
        return list(stored)
    plain = {one.matrix.name: one for one in stored if one.matrix.expert is None}
    sources, find = sources_by_parameter(model, headers), Renaming(model)
    found: list[Unit] = []
    for (parameter, expert), group in groupby(find_matrices(model), key=lambda m: (m.parameter, m.expert is not None)):
        matrices = tuple(group)
        if expert:
            found.append(_stack(model, matrices, sources[parameter], find))
        else:
            found += [plain.pop(matrix.name) for matrix in matrices]
    return [*found, *plain.values()]  # and the head


def _stack(model: PreTrainedModel, matrices: tuple[Matrix, ...], sources: list[Source], find: Renaming) -> StoredStack:
    first = matrices[0]
    path, _, projection = first.parameter.rpartition(".")
    ordered = sorted(sources, key=lambda source: (source.expert or 0, source.part))
    disk_path = _disk_path(ordered[0])
    stack = StoredStack(
        matrix=replace(
            first,
            name=first.parameter,
            expert=None,
            shares_input=_without_number(first.shares_input),
            split=first.split,
        ),
        matrices=matrices,
        tensors=tuple(source.header.name for source in ordered),
        disk_path=disk_path,
        sentinels=(),
        reason=why_dense(model.get_submodule(path)),
    )
    if stack.reason or projection not in PROJECTIONS:
        return replace(stack, reason=stack.reason or "experts of another kind")
    if len({source.header.dtype for source in ordered}) > 1:
        return replace(stack, reason=MIXED)
    names = [f"{disk_path}.{PROJECTIONS[projection]}.{factor}" for factor in "BA"]
    if tuple(find(name)[0] for name in names) != factor_names(first.parameter):
        return replace(stack, reason=RENAMED)
    return replace(stack, sentinels=tuple(_sentinels(projection, ordered)))


def _disk_path(source: Source) -> str:
    """`x.experts` of `x.experts.3.gate_proj.weight` and of `x.experts.gate_up_proj`."""
    pattern = r"\.\w+$" if source.expert is None else r"\.\d+\.\w+\.weight$"
    return re.sub(pattern, "", source.header.name)


def _without_number(key: str) -> str:
    return re.sub(r"\[\d+\]", "", key)


def _sentinels(projection: str, sources: list[Source]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The sentinel as transformers would take it apart: the one expert that it has, in as many parts as the weight."""
    _, rows, columns = sentinel_shape(projection)
    if sources[0].expert is None:
        yield sources[0].header.name, (1, rows, columns)
        return
    for source in sources:
        if source.expert == 0:
            yield source.header.name, (rows // source.parts, columns)
