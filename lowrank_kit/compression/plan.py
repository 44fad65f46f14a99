"""The plan of a compression: every rank and every byte, from headers alone and before any work."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.stacks import StoredStack, Unit
from lowrank_kit.checkpoint.stored import StoredMatrix
from lowrank_kit.checkpoint.writer import Shard, TensorSpec, plan_shards, tensor_bytes
from lowrank_kit.compression.allocation import ALLOCATIONS, Evidence
from lowrank_kit.compression.budget import allocate
from lowrank_kit.compression.forms import Form, form_of
from lowrank_kit.compression.ladder import Ladder, cheapest_form, ladder, stack_ladder
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.targets import Targets, targeted, targets
from lowrank_kit.errors import DoesNotFitError, UsageError
from lowrank_kit.layers import STACKED

ALL_DENSE = "the dense model fits"
BOUGHT_DENSE = "its share buys it whole"
NO_RANK = "rank 1 saves nothing"
KEPT = "kept whole by the recipe"


@dataclass(frozen=True)
class PlannedMatrix:
    """What becomes of one matrix, or of the experts of one fused weight.

    Args:
        stored: the matrix and where it is on disk.
        dtype: of its numbers on disk, as safetensors says it.
        form: how it is stored, see `form_of`; "dense" if it stays dense.
        rank: of what is stored, None if it stays dense.
        reason: why it stays dense, "" if it does not.
    """

    stored: Unit
    dtype: str
    form: str
    rank: int | None
    reason: str

    @property
    def disk_path(self) -> str:
        """What the names of its tensors on disk begin with."""
        return self.stored.disk_path

    def tensors(self) -> list[TensorSpec]:
        """What will be on disk of a factorized matrix, in the order of its form."""
        assert self.rank is not None
        return self.layout.tensors(self.disk_path, self.dtype, self.stored.matrix.shape, self.rank)

    @property
    def layout(self) -> Form:
        """Its form, of what is factorized."""
        return form_of(self.stored, self.form)

    @property
    def numbers_before(self) -> int:
        """Numbers of the dense matrix, or of all experts."""
        return self.stored.count * math.prod(self.stored.matrix.shape)

    @property
    def numbers_after(self) -> int:
        """Numbers stored for it."""
        if self.rank is None:
            return self.numbers_before
        return self.layout.numbers(self.stored.matrix.shape, self.rank)

    @property
    def bytes_before(self) -> int:
        """Bytes of the dense matrix."""
        return self.stored.count * tensor_bytes(self.dtype, self.stored.matrix.shape)

    @property
    def bytes_after(self) -> int:
        """Bytes of its tensors."""
        if self.rank is None:
            return self.bytes_before
        return self.layout.nbytes(self.stored.matrix.shape, self.rank, self.dtype)

    def row(self) -> dict[str, Any]:
        """One row of the plan's table."""
        matrix = self.stored.matrix
        return {
            "matrix": matrix.name,
            "role": matrix.role,
            "block": matrix.block,
            "experts": self.stored.count if isinstance(self.stored, StoredStack) else None,
            "out": matrix.shape[0],
            "in": matrix.shape[1],
            "rank": self.rank,
            "form": self.form,
            "kept": self.numbers_after / self.numbers_before,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "note": self.reason,
        }


@dataclass(frozen=True)
class Plan:
    """Ranks and files of a compression.

    Args:
        checkpoint: the source.
        settings: what was asked for.
        matrices: what becomes of each matrix.
        said: which matrices are targets, and keeps of their own.
    """

    checkpoint: Checkpoint
    settings: CompressSettings
    matrices: tuple[PlannedMatrix, ...]
    said: Targets

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """The files to write, exact to the byte."""
        groups = _output_tensors(self.checkpoint, self.matrices)
        return tuple(plan_shards(groups, max_shard_bytes=self.settings.max_shard_bytes))

    def totals(self) -> dict[str, int | float]:
        """Kept and removed, in numbers and bytes, of the matrices and of the whole model."""
        matrices_before = sum(m.numbers_before for m in self.matrices)
        matrices_after = sum(m.numbers_after for m in self.matrices)
        before = sum(math.prod(h.shape) for h in self.checkpoint.headers.values())
        after = before - matrices_before + matrices_after
        bytes_after = sum(shard.nbytes for shard in self.shards)
        return {
            "factorized": sum(m.stored.count for m in self.matrices if m.rank is not None),
            "matrices": sum(m.stored.count for m in self.matrices),
            "matrix_numbers_before": matrices_before,
            "matrix_numbers_after": matrices_after,
            "matrix_keep": matrices_after / matrices_before,
            "model_numbers_before": before,
            "model_numbers_after": after,
            "model_keep": after / before,
            "bytes_before": self.checkpoint.nbytes,
            "bytes_after": bytes_after,
        }

    def quantization_config(self) -> dict[str, dict[str, Any]]:
        """Module path -> rank and form, of the factorized matrices."""
        return {m.stored.matrix.name: {"rank": m.rank, "form": m.form} for m in self.matrices if m.rank is not None}

    @property
    def spent(self) -> int:
        """What the budget counts: numbers or bytes, of the matrices or of the model."""
        if self.settings.budget_scope == "matrices":
            bytes_asked = self.settings.budget == "size"
            return sum(m.bytes_after if bytes_asked else m.numbers_after for m in self.matrices)
        if self.settings.budget == "size":
            return sum(shard.nbytes for shard in self.shards)
        others = sum(math.prod(h.shape) for h in self.checkpoint.headers.values())
        return others + sum(m.numbers_after - m.numbers_before for m in self.matrices)


def make_plan(
    checkpoint: Checkpoint, settings: CompressSettings, evidence: Mapping[str, Evidence] | None = None
) -> Plan:
    """Plan a compression from the headers of a checkpoint.

    Args:
        checkpoint: of the dense model.
        settings: with the budget.
        evidence: name of a matrix -> what the allocation needs of it, see `evidence_needed`.

    Raises:
        UsageError: the checkpoint is compressed already, or has no matrix.
        DoesNotFitError: the budget is below the smallest possible, which is told.
        ValueError: the allocation needs evidence, and there is none.
    """
    limit, largest, smallest = _bounds(checkpoint, settings)
    if largest.spent <= limit:
        return largest
    checkpoint, said = largest.checkpoint, largest.said
    if ALLOCATIONS[settings.allocation or "uniform"].needs != "nothing" and evidence is None:
        raise ValueError(f"allocation {settings.allocation} needs evidence, see evidence_needed")
    fixed = _fixed_steps(smallest)
    forsale = {m.stored.matrix.name: _ladder(m, settings) for m in smallest.matrices}
    forsale = {name: one for name, one in forsale.items() if name not in said.dense and name not in fixed}
    known = [(evidence or {}).get(name, Evidence()) for name in forsale]
    least = sum(int(one.costs[0]) for one in forsale.values())
    spendable = limit - smallest.spent + least
    while True:
        steps = allocate(list(forsale.values()), known, ALLOCATIONS[settings.allocation or "uniform"], spendable)
        plan = _plan(checkpoint, settings, said, fixed | dict(zip(forsale, steps, strict=True)))
        excess = plan.spent - limit
        if excess <= 0:
            return plan
        # A header in a file grows with the digits of the ranks; at the first steps all is known to fit.
        bought = sum(int(one.costs[step]) for one, step in zip(forsale.values(), steps, strict=True))
        spendable = max(least, bought - excess)


def evidence_needed(checkpoint: Checkpoint, settings: CompressSettings) -> str:
    """What `make_plan` will need: "nothing", "weights", "inputs" or "loss"; what it refuses is refused here.

    Raises:
        UsageError: the checkpoint is compressed already, or has no matrix.
        DoesNotFitError: the budget is below the smallest possible, which is told.
    """
    limit, largest, _ = _bounds(checkpoint, settings)
    if largest.spent <= limit:
        return "nothing"
    return ALLOCATIONS[settings.allocation or "uniform"].needs


def _bounds(checkpoint: Checkpoint, settings: CompressSettings) -> tuple[int, Plan, Plan]:
    """The budget in numbers or bytes, the largest plan and the smallest, after refusing a budget below both."""
    _refuse_compressed(checkpoint)
    checkpoint = targeted(checkpoint, settings)
    said = targets(checkpoint, settings)
    dense = _plan(checkpoint, settings, said, {})
    fixed = _fixed_steps(dense)
    largest = _plan(checkpoint, settings, said, fixed)
    smallest = _plan(checkpoint, settings, said, {m.stored.matrix.name: 0 for m in dense.matrices} | fixed)
    limit = settings.limit(dense.spent)
    least_plan = min(smallest, largest, key=lambda plan: plan.spent)
    least = least_plan.spent
    if limit < least:
        unit = "bytes" if settings.budget == "size" else "numbers"
        possible = f"{least:,} {unit}"
        amount: float | int = least
        if settings.budget == "keep":
            amount = math.ceil(Fraction(least, dense.spent) * 10**6) / 10**6
            possible = f"{amount:g}, {possible}"
        raise DoesNotFitError(
            f"the budget is {settings.budget_words}, and the smallest possible is {possible}: "
            f"{_counts(least_plan)}, everything else as it is",
            hint=f"--{settings.budget} {amount}, or more",
        )
    return limit, largest, smallest


def _counts(plan: Plan) -> str:
    """How many matrices become what."""

    def what(planned: PlannedMatrix) -> str:
        if planned.rank is None:
            return f"dense ({planned.reason})"
        return "as the recipe keeps them" if planned.stored.matrix.name in plan.said.keeps else "at rank 1"

    counts: Counter[str] = Counter()
    for planned in plan.matrices:
        counts[what(planned)] += planned.stored.count
    return ", ".join(f"{count} of {counts.total()} matrices {words}" for words, count in counts.items())


def _refuse_compressed(checkpoint: Checkpoint) -> None:
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        raise UsageError(
            f"{checkpoint.path} is compressed already (quantization_config of method {method})",
            hint="compress the dense model it was made from",
        )


def _fixed_steps(plan: Plan) -> dict[str, int]:
    """Steps of the matrices that the recipe gives a keep of their own.

    Raises:
        DoesNotFitError: a keep below that of rank 1.
    """
    planned = {m.stored.matrix.name: m for m in plan.matrices}
    return {name: _own_step(planned[name], keep, plan.settings) for name, keep in plan.said.keeps.items()}


def _own_step(planned: PlannedMatrix, keep: Fraction, settings: CompressSettings) -> int:
    rungs, form = _ladder(planned, settings), settings.form or "factors"
    numbers = rungs.numbers(form, _counted(planned, settings))
    within = [step for step, count in enumerate(numbers) if count <= keep * numbers[-1]]
    if within or len(rungs) == 1:
        return within[-1] if within else 0
    least = math.ceil(Fraction(numbers[0], numbers[-1]) * 10**6) / 10**6
    raise DoesNotFitError(
        f"the recipe keeps {float(keep):g} of {planned.stored.matrix.name}, and the smallest possible is {least:g}: "
        f"{numbers[0]:,} of its {numbers[-1]:,} numbers, at rank {rungs.rank(0)}",
        hint=f"keep: {least:g}, or more",
    )


def _plan(checkpoint: Checkpoint, settings: CompressSettings, said: Targets, steps: Mapping[str, int]) -> Plan:
    """The plan with these steps of the ladders; what has none stays dense."""
    planned = (_decide(checkpoint, settings, stored, said, steps) for stored in checkpoint.units())
    return Plan(checkpoint, settings, tuple(planned), said)


def _decide(
    checkpoint: Checkpoint, settings: CompressSettings, stored: Unit, said: Targets, steps: Mapping[str, int]
) -> PlannedMatrix:
    name = stored.matrix.name
    dense = PlannedMatrix(stored, checkpoint.headers[stored.tensors[0]].dtype, "dense", None, ALL_DENSE)
    if name in said.dense:
        return replace(dense, reason=said.dense[name])
    if name not in steps:
        return dense
    rungs = _ladder(dense, settings)
    rank = rungs.rank(steps[name])
    if rank is None:
        bought = KEPT if name in said.keeps else BOUGHT_DENSE
        return replace(dense, reason=bought if len(rungs) > 1 else NO_RANK)
    form = STACKED
    if isinstance(stored, StoredMatrix):
        form = cheapest_form(stored.matrix.shape, rank, settings.form or "factors", _counted(dense, settings))
    return replace(dense, form=form, rank=rank, reason="")


def _ladder(planned: PlannedMatrix, settings: CompressSettings) -> Ladder:
    """What the matrix can be, in the unit of the budget."""
    if isinstance(planned.stored, StoredStack):
        return stack_ladder(planned.stored, _counted(planned, settings), settings.align)
    form = settings.form or "factors"
    return ladder(planned.stored.matrix.shape, form, _counted(planned, settings), settings.align)


def _counted(planned: PlannedMatrix, settings: CompressSettings) -> str | None:
    """The dtype on disk where the budget counts bytes."""
    return planned.dtype if settings.budget == "size" else None


def _output_tensors(checkpoint: Checkpoint, planned: Sequence[PlannedMatrix]) -> Iterator[list[TensorSpec]]:
    """What will be on disk, in the order of the source: what is stored of a matrix in its place."""
    factorized = {p.stored.tensors[0]: p for p in planned if p.rank is not None}
    replaced = {name: p for p in factorized.values() for name in p.stored.tensors}
    written: set[int] = set()
    for header in checkpoint.headers.values():
        if (p := replaced.get(header.name)) is None:
            yield [(output_name(header.name, factorized), header.dtype, header.shape)]
        elif id(p) not in written:
            written.add(id(p))
            yield p.tensors()


def output_name(name: str, factorized: Mapping[str, PlannedMatrix]) -> str:
    """Name in the output of a tensor that is no factorized matrix: the bias of two factors becomes `X.B.bias`."""
    path, _, leaf = name.rpartition(".")
    planned = factorized.get(f"{path}.weight")
    return f"{path}.B.bias" if leaf == "bias" and planned is not None and planned.form == "factors" else name
