"""What a compression takes, from headers and settings alone: memory by section, disk, and whether there is as much.

A section is a block, or what comes before or after the blocks: one at a time is in memory. All is estimated but the
bytes of the output: what products and an allocator take for a while is not counted.
"""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lowrank_kit.checkpoint.folder import Checkpoint
from lowrank_kit.checkpoint.headers import DTYPE_BITS
from lowrank_kit.compression.chain import block_paths
from lowrank_kit.compression.objectives import OBJECTIVES
from lowrank_kit.compression.plan import Plan
from lowrank_kit.compression.sections import AFTER, BEFORE
from lowrank_kit.compression.settings import CompressSettings
from lowrank_kit.compression.targets import foldable
from lowrank_kit.device import available_memory
from lowrank_kit.errors import DoesNotFitError
from lowrank_kit.matrices import Matrix, block_of, block_path
from lowrank_kit.report.tables import amount

# Bytes of a number: of what is summed and decomposed, and of what is trained and kept between stages.
WIDE, SINGLE = 8, 4
# Square matrices in float64 that a decomposition holds at once: the symmetric one, its vectors and LAPACK's workspace.
SQUARES = 3
# Of a tensor that is trained: gradient, two moments, the best state, and the state that is tried as it is stored.
TRAINING_COPIES = 5
# Of the logits: themselves, their log-softmax and its gradient.
LOGIT_COPIES = 3


@dataclass(frozen=True)
class SectionNeeds:
    """Bytes of memory at the peak of one section.

    Args:
        section: path of the block, BEFORE or AFTER.
        weights: the dense section, and the factors beside it.
        grams: of inputs, and of gradients.
        streams: hidden states of all texts; 0 where they are spilled.
        workspace: the larger of the largest decomposition and a batch's activations.
        training: what refinement by block adds to the factors.
    """

    section: str
    weights: int
    grams: int
    streams: int
    workspace: int
    training: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.grams + self.streams + self.workspace + self.training


@dataclass(frozen=True)
class Needs:
    """What a compression takes.

    Args:
        sections: memory of each.
        end_to_end: memory of refinement end to end, which holds two models whole; 0 without.
        disk: what -> bytes.
    """

    sections: tuple[SectionNeeds, ...]
    end_to_end: int
    disk: dict[str, int]

    @property
    def memory(self) -> int:
        """Bytes at the peak."""
        return max(self.end_to_end, *(section.total for section in self.sections))

    def by_disk(self, folder: Path, spill: Path | None) -> dict[Path, int]:
        """Bytes on each disk, by a folder on it: that of the output, and another one that the streams may be on."""
        streams = self.disk["streams"]
        everything = {folder: sum(self.disk.values())}
        if spill is None or _device_of(spill) == _device_of(folder):
            return everything
        return {folder: everything[folder] - streams, spill: streams}

    def record(self, device: torch.device, folder: Path | None, spill: Path | None = None) -> dict[str, Any]:
        """All numbers as plain values, and whether they fit.

        Args:
            device: where the text is run; streams are in the CPU's memory, and all else may be in both.
            folder: where the output is to be; None leaves the disk out of what is compared.
            spill: where the streams are, if they are in files.
        """
        wanted, cpu = {device: self.memory}, torch.device("cpu")
        if device.type == "cuda":
            wanted = {device: max(self.end_to_end, *(s.total - s.streams for s in self.sections)), cpu: self.memory}
        free = {where: available_memory(where) for where in wanted}
        disk_free = None if folder is None else free_disk(folder)
        warnings = [
            f"{amount(nbytes)} of memory may be needed, {where} has {amount(free[where])} left"
            for where, nbytes in wanted.items()
            if nbytes > free[where]
        ]
        if folder is not None:
            warnings += [
                f"{amount(nbytes)} of disk are needed at {where}, {amount(free_disk(where))} are free"
                for where, nbytes in self.by_disk(folder, spill).items()
                if nbytes > free_disk(where)
            ]
        return {
            "memory": self.memory,
            "memory_free": {str(where): nbytes for where, nbytes in free.items()},
            "sections": [{**asdict(section), "total": section.total} for section in self.sections],
            "end_to_end": self.end_to_end,
            "disk": {**self.disk, "total": sum(self.disk.values())},
            "disk_free": disk_free,
            "fits": not warnings,
            "warnings": warnings,
        }


def estimate_needs(
    checkpoint: Checkpoint,
    settings: CompressSettings,
    *,
    dtype: torch.dtype | str = torch.float32,
    spill: bool = False,
    kept: float = 1.0,
    output: int = 0,
) -> Needs:
    """What a compression takes.

    Args:
        checkpoint: of the dense model, as `targeted` gives it.
        settings: with nothing left open.
        dtype: of the runs; "auto" is the checkpoint's own. Refinement is in float32.
        spill: streams are in files.
        kept: share of the numbers of the matrices.
        output: bytes of the files to be written, as the plan has them.
    """
    return _Estimate(checkpoint, settings, dtype, spill, kept).needs(output)


def planned_needs(
    plan: Plan, settings: CompressSettings, *, dtype: torch.dtype | str = torch.float32, spill: bool = False
) -> Needs:
    """What a compression takes whose plan is known, or another plan for the same budget.

    Args:
        plan: for the bytes of the output.
        settings: of the run.
        dtype, spill: as in `estimate_needs`.
    """
    totals = plan.totals()
    kept, output = float(totals["matrix_keep"]), int(totals["bytes_after"])
    return estimate_needs(plan.checkpoint, settings, dtype=dtype, spill=spill, kept=kept, output=output)


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or would be made."""
    return shutil.disk_usage(_there(folder)).free


def check_disk(needs: Needs, folder: Path, spill: Path | None = None) -> None:
    """Refuse a run for which there is too little disk.

    Raises:
        DoesNotFitError: with what takes it.
    """
    for where, wanted in needs.by_disk(folder, spill).items():
        if wanted > (free := free_disk(where)):
            parts = ", ".join(f"{name} {amount(nbytes)}" for name, nbytes in needs.disk.items() if nbytes)
            raise DoesNotFitError(
                f"{wanted:,} bytes of disk are needed at {where}, and {free:,} are free: {parts}",
                hint="a folder on another disk, a lower budget, or --allocation uniform or erank",
            )


def _there(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def _device_of(folder: Path) -> int:
    return _there(folder).stat().st_dev


class _Estimate:
    """The parts of an estimate."""

    def __init__(
        self, checkpoint: Checkpoint, settings: CompressSettings, dtype: torch.dtype | str, spill: bool, kept: float
    ) -> None:
        assert settings.block_tokens is not None
        self.checkpoint, self.settings, self.spill, self.kept = checkpoint, settings, spill, kept
        self.model = checkpoint.meta_model()
        self.targets = [matrix for unit in foldable(checkpoint, settings) for matrix in unit.matrices]
        objective = OBJECTIVES[settings.objective]
        self.sequential = objective.sequential
        self.surveyed = settings.allocation in ("lagrange", "loss") or "output_gram" in objective.needs
        self.by_block, self.end_to_end = (settings.refine in (name, "both") for name in ("block", "e2e"))
        self.text = objective.needs_text or self.surveyed or self.by_block or self.end_to_end
        self.number = SINGLE if self.by_block or self.end_to_end else _bytes_of_number(dtype, checkpoint)
        self.tokens = settings.batch_size * settings.block_tokens
        self.blocks = dict.fromkeys(block_paths(stored.matrix for stored in checkpoint.matrices()))
        config = self.model.config.get_text_config()
        self.row = settings.block_tokens * config.hidden_size * self.number
        self.logits = LOGIT_COPIES * SINGLE * self.tokens * config.vocab_size

    def needs(self, output: int) -> Needs:
        """All of it."""
        after = frozenset(_after_the_blocks(self.model, self.blocks))
        here: dict[str, list[Matrix]] = defaultdict(list)
        for matrix in self.targets:
            here[_section_of(matrix.parameter, self.blocks, after)].append(matrix)
        weights = _section_weights(self.model, self.blocks, after)
        sections = [self._section(name, numbers, here[name]) for name, numbers in weights.items()]
        disk = {"output": output, "finished blocks": output, "survey": self._survey_files()}
        disk["streams"] = self._streams() if self.spill else 0
        return Needs(tuple(sections), self._end_to_end() if self.end_to_end else 0, disk)

    def _section(self, name: str, numbers: int, here: list[Matrix]) -> SectionNeeds:
        factors = round(self.kept * _numbers(here))
        activations = self._activations(here) + (self.logits if name == AFTER else 0) if self.text else 0
        return SectionNeeds(
            section=name,
            weights=self.number * (numbers + factors) if self.text else WIDE * max(map(_size, here), default=0),
            grams=self._grams(here, 1 if name in self.blocks else 2) if self.text else 0,
            streams=0 if self.spill else self._streams(),
            workspace=max([activations, *map(self._decomposition, here)]),
            training=TRAINING_COPIES * SINGLE * factors if self.by_block and name in self.blocks else 0,
        )

    def _grams(self, here: Collection[Matrix], texts: int) -> int:
        """Of calibration and check text: in a block of one after the other."""
        inputs = {matrix.shares_input: matrix.shape[1] ** 2 for matrix in here}.values()
        squares = texts * sum(inputs)
        if self.sequential:  # what one input is in the compressed model, and with the dense one
            squares += 2 * max(inputs, default=0)
        if self.settings.needs_curvature:
            squares += sum(matrix.shape[0] ** 2 for matrix in here)
        return WIDE * squares

    def _decomposition(self, matrix: Matrix) -> int:
        rows, columns = matrix.shape
        squares = min(rows, columns) ** 2
        if self.text:
            squares = columns**2 + (rows**2 if self.settings.needs_curvature else 0)
        return WIDE * (rows * columns + (rows + columns) * min(rows, columns) + SQUARES * squares)

    def _activations(self, here: Iterable[Matrix]) -> int:
        return self.tokens * self.number * sum(sum(matrix.shape) for matrix in here)

    def _streams(self) -> int:
        """Hidden states of all texts; in files there is a second one of each for a while."""
        if not self.text:
            return 0
        asked, times = self.settings, 2 if self.spill else 1
        folding = asked.calibration_blocks * (2 if self.sequential else 1) + 2 * asked.check_blocks
        folding += 2 * asked.refine_blocks if self.by_block else 0
        # Backward, each block is run once more from what it read, and gradients go the other way.
        backward = asked.calibration_blocks * (len(self.blocks) + 1 + times) if asked.needs_curvature else 0
        return self.row * max(times * folding, backward)

    def _survey_files(self) -> int:
        """Factors of full rank, or Grams of gradients, that are found before the folding; in float32."""
        if not self.surveyed:
            return 0
        if not self.sequential:
            return SINGLE * sum(sum(matrix.shape) * min(matrix.shape) for matrix in self.targets)
        needed = "output_gram" in OBJECTIVES[self.settings.objective].needs
        return SINGLE * sum(matrix.shape[0] ** 2 for matrix in self.targets) if needed else 0

    def _end_to_end(self) -> int:
        """Two models whole, and what training adds to the factors."""
        everything, in_matrices = sum(p.numel() for p in self.model.parameters()), _numbers(self.targets)
        factors = self.kept * in_matrices
        trained = everything - in_matrices + factors + TRAINING_COPIES * factors
        return round(SINGLE * (everything + trained) + self._activations(self.targets) + 2 * self.logits)


def _section_weights(model: PreTrainedModel, blocks: dict[str, None], after: Collection[str]) -> dict[str, int]:
    """Name of a section -> numbers in it; a head that is tied counts where it is used, too."""
    weights = dict.fromkeys((BEFORE, *blocks, AFTER), 0)
    for name, parameter in model.named_parameters():
        weights[_section_of(name, blocks, after)] += parameter.numel()
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        weights[AFTER] += head.weight.numel()
    return weights


def _after_the_blocks(model: PreTrainedModel, blocks: dict[str, None]) -> list[str]:
    """Names of the parameters that come after those of the last block."""
    names = [name for name, _ in model.named_parameters()]
    last = max((i for i, name in enumerate(names) if _section_of(name, blocks, ()) in blocks), default=-1)
    return names[last + 1 :]


def _section_of(parameter: str, blocks: dict[str, None], after: Collection[str]) -> str:
    if block_of(parameter) is not None and (path := block_path(parameter)) in blocks:
        return path
    return AFTER if parameter in after else BEFORE


def _bytes_of_number(dtype: torch.dtype | str, checkpoint: Checkpoint) -> int:
    if isinstance(dtype, torch.dtype):
        return dtype.itemsize
    return max(DTYPE_BITS[header.dtype] for header in checkpoint.headers.values()) // 8


def _size(matrix: Matrix) -> int:
    return math.prod(matrix.shape)


def _numbers(matrices: Iterable[Matrix]) -> int:
    return sum(map(_size, matrices))
