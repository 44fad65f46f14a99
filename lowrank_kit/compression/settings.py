"""Everything a compression is made of."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_kit.checkpoint.writer import MAX_SHARD_BYTES
from lowrank_kit.compression.allocation import ALLOCATIONS
from lowrank_kit.compression.forms import FORMS
from lowrank_kit.compression.objectives import OBJECTIVES
from lowrank_kit.errors import UsageError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class CompressSettings:
    """Settings of `lowrank compress`.

    Args:
        keep: fraction of the numbers of the matrices that is kept, 0 < keep <= 1.
        objective: what the factors minimize, see `OBJECTIVES`.
        allocation: how the budget becomes ranks, see `ALLOCATIONS`.
        form: how a factorized matrix is stored, see `FORMS`.
        text: text source of the calibration; None is the standard library. Its held-out part is left alone.
        calibration_blocks: sequences of calibration text.
        check_blocks: sequences apart from the calibration, on which errors are measured.
        block_tokens: tokens in a sequence.
        batch_size: sequences in a forward pass.
        max_bytes: most bytes of text to take from the source.
        max_shard_bytes: most bytes of tensors in a file.
        seed: of the choice of calibration text.

    Raises:
        UsageError: keep outside (0, 1], an unknown objective, allocation or form, a size below 1.
    """

    keep: float
    objective: str = "whiten"
    allocation: str = "uniform"
    form: str = "factors"
    text: str | None = None
    calibration_blocks: int = 128
    check_blocks: int = 32
    block_tokens: int = 256
    batch_size: int = 8
    max_bytes: int | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UsageError(
                f"keep must be in (0, 1], got {self.keep:g}: it is the fraction of the matrices' numbers that is kept",
                hint="--keep 0.6 keeps 60 % and removes 40 %",
            )
        for name, choices in (("objective", OBJECTIVES), ("allocation", ALLOCATIONS), ("form", FORMS)):
            value = getattr(self, name)
            if value not in choices:
                raise UsageError(f'unknown {name} "{value}"', hint=did_you_mean(value, choices))
        ones = ("calibration_blocks", "check_blocks", "batch_size", "max_shard_bytes")
        for name, least in (*((name, 1) for name in ones), ("block_tokens", 2)):
            if getattr(self, name) < least:
                default = f"--{name.replace('_', '-')} {getattr(type(self), name)}"
                raise UsageError(f"{name} must be at least {least}, got {getattr(self, name)}", hint=default)
