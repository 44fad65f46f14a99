"""Singular values of every matrix of a checkpoint, one shard at a time, without building the model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lowrank_kit.checkpoint.folder import Checkpoint, told_where
from lowrank_kit.checkpoint.stored import StoredMatrix
from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.linalg.spectrum import effective_rank, rank_at_energy, singular_values, stable_rank

# The measures of a spectrum; each is also given as a share of min(m, n).
MEASURES = ("stable_rank", "effective_rank", "rank_90", "rank_95", "rank_99")


@dataclass(frozen=True, eq=False)
class MatrixSpectrum:
    """The spectrum of one matrix and what it says.

    Args:
        name: the matrix, as `checkpoint.matrices()` names it.
        role: q, k, v, o, gate, up, down, or the model's own name.
        block: index of its block, None outside the blocks.
        expert: index of its expert, None for a plain matrix.
        shape: (out, in).
        factor_rank: rank of what is stored, None for a dense matrix.
        singular_values: [min(out, in)] float64, descending.
        frobenius: Frobenius norm.
        stable_rank: (Frobenius / spectral norm)^2.
        effective_rank: exp of the entropy of the normalized singular values.
        rank_90: smallest rank that keeps 90 % of the energy, the sum of squared singular values; so 95 and 99.
    """

    name: str
    role: str
    block: int | None
    expert: int | None
    shape: tuple[int, int]
    factor_rank: int | None
    singular_values: np.ndarray
    frobenius: float
    stable_rank: float
    effective_rank: float
    rank_90: int
    rank_95: int
    rank_99: int

    def share(self, measure: str) -> float:
        """One of MEASURES as a share of min(out, in)."""
        return getattr(self, measure) / min(self.shape)

    def record(self) -> dict[str, Any]:
        """One flat row: all numbers and shares, without the singular values."""
        row = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("shape", "singular_values")}
        row |= {"out": self.shape[0], "in": self.shape[1]}
        return row | {f"{measure}_share": self.share(measure) for measure in MEASURES}


@dataclass(frozen=True)
class RoleSummary:
    """Means over the matrices of one role; every share is of min(out, in)."""

    role: str
    num_matrices: int
    stable_rank_share: float
    effective_rank_share: float
    rank_90_share: float
    rank_95_share: float
    rank_99_share: float


@dataclass(frozen=True, eq=False)
class Spectra:
    """The spectra of a model's matrices, in model order."""

    model: str
    rows: tuple[MatrixSpectrum, ...]

    def by_role(self) -> list[RoleSummary]:
        """One summary for each role, in order of first appearance."""
        groups: dict[str, list[MatrixSpectrum]] = {}
        for row in self.rows:
            groups.setdefault(row.role, []).append(row)
        return [_summary(role, rows) for role, rows in groups.items()]

    def overall(self) -> RoleSummary:
        """Plain mean over all matrices, each counted once whatever its size; the role is "all"."""
        return _summary("all", self.rows)


def measure(checkpoint: Checkpoint, *, progress: bool = True) -> Spectra:
    """Measure every matrix of a checkpoint, dense or compressed.

    A shard is read once and one tensor is held at a time, besides the parts of a compressed matrix until all are read.

    Args:
        checkpoint: an open checkpoint.
        progress: draw a bar on stderr when that is a terminal.

    Raises:
        UsageError: no matrix in this architecture.
        LowRankError: a matrix holds NaN or Inf.
    """
    stored = checkpoint.matrices()
    users: dict[str, list[int]] = defaultdict(list)
    for index, matrix in enumerate(stored):
        for name in matrix.tensors:
            users[name].append(index)
    rows: dict[int, MatrixSpectrum] = {}
    waiting: dict[str, Tensor] = {}
    with tqdm(total=len(stored), desc="spectra", unit="matrix", disable=None if progress else True) as bar:
        for name, tensor in checkpoint.tensors(users):
            waiting[name] = tensor
            for index in users[name]:
                tensors = stored[index].tensors
                if all(part in waiting for part in tensors):
                    with told_where(checkpoint.path):
                        rows[index] = measure_matrix(stored[index], *(waiting[part] for part in tensors))
                    bar.update()
            for done in [n for n in waiting if all(index in rows for index in users[n])]:
                del waiting[done]
    return Spectra(str(checkpoint.path), tuple(rows[index] for index in range(len(stored))))


def measure_matrix(stored: StoredMatrix, *tensors: Tensor) -> MatrixSpectrum:
    """Measure one matrix from the tensors that hold it.

    Raises:
        LowRankError: NaN or Inf among its numbers.
    """
    matrix = stored.matrix
    if stored.compressed:
        for tensor in tensors:
            _check_finite(tensor, matrix.name)
        B, A = stored.factors(*tensors)
        factor_rank, s_S = len(A), singular_values_of_factors(B, A)
    else:
        W = stored.weight(*tensors)
        _check_finite(W, matrix.name)
        factor_rank, s_S = None, singular_values(W)
    return MatrixSpectrum(
        name=matrix.name,
        role=matrix.role,
        block=matrix.block,
        expert=matrix.expert,
        shape=matrix.shape,
        factor_rank=factor_rank,
        singular_values=s_S.numpy(),
        frobenius=s_S.norm().item(),
        stable_rank=stable_rank(s_S),
        effective_rank=effective_rank(s_S),
        rank_90=rank_at_energy(s_S, 0.90),
        rank_95=rank_at_energy(s_S, 0.95),
        rank_99=rank_at_energy(s_S, 0.99),
    )


def singular_values_of_factors(B_OR: Tensor, A_RI: Tensor) -> Tensor:
    """Singular values of B A without making it: with B = Q_B R_B and A^T = Q_A R_A they are those of R_B R_A^T.

    Args:
        B_OR: [O, R].
        A_RI: [R, I].

    Returns:
        [min(O, I)] float64, descending; those beyond R are zero.
    """
    _, R_B = torch.linalg.qr(B_OR.double(), mode="r")
    _, R_A = torch.linalg.qr(A_RI.mT.double(), mode="r")
    s = singular_values(R_B @ R_A.mT)
    return torch.nn.functional.pad(s, (0, min(B_OR.shape[0], A_RI.shape[1]) - len(s)))


def check_comparable(first: Checkpoint, second: Checkpoint) -> None:
    """Refuse to set two models side by side whose matrices differ in name or shape. Reads no weight.

    Raises:
        UsageError: a matrix is in one of them only, or has another shape.
    """
    shapes = [{stored.matrix.name: stored.matrix.shape for stored in model.matrices()} for model in (first, second)]
    hint = "models can be set side by side when they have the same architecture and size"
    for (owner, mine), (lacking, theirs) in permutations(zip((first, second), shapes, strict=True)):
        if missing := [name for name in mine if name not in theirs]:
            raise UsageError(
                f"{len(missing)} matrices of {owner.path} are not in {lacking.path}, first {missing[0]}", hint=hint
            )
    for name, (rows, columns) in shapes[0].items():
        if shapes[1][name] != (rows, columns):
            other = "{} x {}".format(*shapes[1][name])
            raise UsageError(
                f"matrix {name} is {rows} x {columns} in {first.path} and {other} in {second.path}", hint=hint
            )


def _check_finite(part: Tensor, name: str) -> None:
    if torch.isfinite(part).all():
        return
    nans, infs = int(part.isnan().sum()), int(part.isinf().sum())
    raise LowRankError(
        f"matrix {name} holds {nans} NaN and {infs} Inf among its {part.numel():,} numbers",
        hint="the training run diverged or the file is damaged: take an earlier checkpoint",
    )


def _summary(role: str, rows: tuple[MatrixSpectrum, ...] | list[MatrixSpectrum]) -> RoleSummary:
    means = {f"{measure}_share": float(np.mean([row.share(measure) for row in rows])) for measure in MEASURES}
    return RoleSummary(role, len(rows), **means)
