"""The plan of a compression: every rank and every byte, from headers alone and before any work."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.stored import StoredMatrix
from lowrank_kit.checkpoint.writer import Shard, TensorSpec, plan_shards
from lowrank_kit.compression.allocation import ALLOCATIONS
from lowrank_kit.compression.forms import FORMS
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.errors import UsageError


@dataclass(frozen=True)
class PlannedMatrix:
    """What becomes of one matrix.

    Args:
        stored: the matrix and where it is on disk.
        rank: of what is stored, None if it stays dense.
        reason: why it stays dense, "" if it does not.
        form: of storage, see `FORMS`; without meaning if it stays dense.
    """

    stored: StoredMatrix
    rank: int | None
    reason: str
    form: str = "factors"

    @property
    def numbers_before(self) -> int:
        """Numbers of the dense matrix."""
        return math.prod(self.stored.matrix.shape)

    @property
    def numbers_after(self) -> int:
        """Numbers stored for it."""
        if self.rank is None:
            return self.numbers_before
        return FORMS[self.form].numbers(self.stored.matrix.shape, self.rank)

    def row(self) -> dict[str, Any]:
        """One row of the plan's table."""
        matrix = self.stored.matrix
        return {
            "matrix": matrix.name,
            "role": matrix.role,
            "block": matrix.block,
            "out": matrix.shape[0],
            "in": matrix.shape[1],
            "rank": self.rank,
            "form": "dense" if self.rank is None else self.form,
            "kept": self.numbers_after / self.numbers_before,
            "note": self.reason,
        }


@dataclass(frozen=True)
class Plan:
    """Ranks and files of a compression.

    Args:
        checkpoint: the source.
        settings: what was asked for.
        matrices: what becomes of each matrix.
        shards: the files to write, exact to the byte.
    """

    checkpoint: Checkpoint
    settings: CompressSettings
    matrices: tuple[PlannedMatrix, ...]
    shards: tuple[Shard, ...]

    def totals(self) -> dict[str, int | float]:
        """Kept and removed, in numbers and bytes, of the matrices and of the whole model."""
        matrices_before = sum(m.numbers_before for m in self.matrices)
        matrices_after = sum(m.numbers_after for m in self.matrices)
        before = sum(math.prod(h.shape) for h in self.checkpoint.headers.values())
        after = before - matrices_before + matrices_after
        files = {h.file for h in self.checkpoint.headers.values()}
        bytes_before = sum((self.checkpoint.path / file).stat().st_size for file in files)
        bytes_after = sum(shard.nbytes for shard in self.shards)
        return {
            "factorized": sum(m.rank is not None for m in self.matrices),
            "matrices": len(self.matrices),
            "matrix_numbers_before": matrices_before,
            "matrix_numbers_after": matrices_after,
            "matrix_keep": matrices_after / matrices_before,
            "model_numbers_before": before,
            "model_numbers_after": after,
            "model_keep": after / before,
            "bytes_before": bytes_before,
            "bytes_after": bytes_after,
        }

    def quantization_config(self) -> dict[str, dict[str, Any]]:
        """Module path -> rank and form, of the factorized matrices."""
        return {m.stored.matrix.name: {"rank": m.rank, "form": m.form} for m in self.matrices if m.rank is not None}


def make_plan(checkpoint: Checkpoint, settings: CompressSettings) -> Plan:
    """Plan a compression from the headers of a checkpoint.

    Raises:
        UsageError: the checkpoint is compressed already, or has no matrix.
    """
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise UsageError(
            f"{checkpoint.path} is compressed already (quantization_config of method {method})",
            hint="compress the dense model it was made from",
        )
    stored = checkpoint.matrices()
    ranks = ALLOCATIONS[settings.allocation]([s.matrix for s in stored], settings.keep)
    planned = tuple(_decide(s, rank, settings.keep, settings.form) for s, rank in zip(stored, ranks, strict=True))
    shards = plan_shards(_output_tensors(checkpoint, planned), max_shard_bytes=settings.max_shard_bytes)
    return Plan(checkpoint, settings, planned, tuple(shards))


def planned_tensors(planned: PlannedMatrix, dtype: str) -> list[TensorSpec]:
    """What will be on disk of a factorized matrix, in the order of its form."""
    assert planned.rank is not None
    path = planned.stored.tensors[0].removesuffix(".weight")
    return FORMS[planned.form].tensors(path, dtype, planned.stored.matrix.shape, planned.rank)


def _decide(stored: StoredMatrix, rank: int, keep: float, form: str) -> PlannedMatrix:
    if stored.matrix.expert is not None:
        return PlannedMatrix(stored, None, "a fused expert")
    if keep == 1:
        return PlannedMatrix(stored, None, "keep is 1")
    if FORMS[form].numbers(stored.matrix.shape, rank) >= math.prod(stored.matrix.shape):
        return PlannedMatrix(stored, None, f"rank {rank} would not save anything")
    return PlannedMatrix(stored, rank, "", form)


def _output_tensors(checkpoint: Checkpoint, planned: tuple[PlannedMatrix, ...]) -> Iterator[list[TensorSpec]]:
    """What will be on disk, in the order of the source: what is stored of a matrix in its place."""
    factorized = {p.stored.tensors[0]: p for p in planned if p.rank is not None}
    for header in checkpoint.headers.values():
        if (p := factorized.get(header.name)) is not None:
            yield planned_tensors(p, header.dtype)
        else:
            yield [(output_name(header.name, factorized), header.dtype, header.shape)]


def output_name(name: str, factorized: Mapping[str, PlannedMatrix]) -> str:
    """Name in the output of a tensor that is no factorized matrix: the bias of two factors becomes `X.B.bias`."""
    path, _, leaf = name.rpartition(".")
    planned = factorized.get(f"{path}.weight")
    return f"{path}.B.bias" if leaf == "bias" and planned is not None and planned.form == "factors" else name
