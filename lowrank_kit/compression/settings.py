"""Everything a compression is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from lowrank_kit.checkpoint.writer import MAX_SHARD_BYTES
from lowrank_kit.compression.allocation import ALLOCATIONS
from lowrank_kit.compression.forms import FORMS
from lowrank_kit.compression.objectives import OBJECTIVES, Options
from lowrank_kit.compression.recipe import KeepRule
from lowrank_kit.errors import UsageError, did_you_mean

BUDGETS = ("keep", "params", "size")
# What a budget is of, unless said otherwise.
SCOPES = {"keep": "matrices", "params": "model", "size": "model"}
AUTO = "auto"
REFINES = ("none", "block", "e2e", "both")
LEAST = {
    **dict.fromkeys(("calibration_blocks", "check_blocks", "refine_blocks", "batch_size", "max_shard_bytes"), 1),
    **dict.fromkeys(("block_epochs", "e2e_epochs", "align"), 1),
    "block_tokens": 2,
    **dict.fromkeys(("block_rate", "e2e_rate"), 0.0),
}


@dataclass(frozen=True, kw_only=True)
class CompressSettings:
    """Settings of `lowrank compress`, with exactly one budget: keep, params or size.

    Args:
        keep: fraction of the numbers that is kept, 0 < keep <= 1.
        params: most numbers that are kept.
        size: most bytes of the safetensors files, header and all; with scope "matrices" of the matrices' tensors.
        scope: what the budget is of: "matrices", fused experts among them, or the whole "model"; None is the
            matrices for keep, the model for params and size.
        objective: what the factors minimize, see `OBJECTIVES`; "auto" chooses it and what of allocation, form and
            refine is None, by the model and the time (`auto.py`).
        allocation: in which order ranks are bought, see `ALLOCATIONS`; None is uniform where the objective is given.
        form: how a factorized matrix is stored, see `FORMS`; "auto" is pivoted where that stores less error than two
            factors in the same bytes; None is factors where the objective is given.
        refine: training against the dense model after factorizing: "block" by block, "e2e" end to end, "both", or
            "none"; None is none where the objective is given.
        time: seconds that "auto" may plan for.
        blend: of anchored objectives, 0 <= b <= 1: 0 keeps the map from the compressed model's inputs, 1 the outputs
            of the dense model.
        align: what ranks are multiples of; None goes with the shape, see `default_align`.
        include: patterns of names, as in a shell; what none of them matches stays dense. The LM head is a target if one
            of them is its name, and counts as a matrix then.
        exclude: patterns of names of matrices that stay dense, and are counted by the budget like others.
        keeps: matrices with a keep of their own, see `KeepRule`; the first that takes a matrix. The rest of the budget
            is for the others.
        text: text source of the calibration; None is the standard library. Its held-out part is left alone.
        calibration_blocks: sequences of calibration text.
        check_blocks: sequences apart from the calibration, on which errors are measured and refinement is judged.
        refine_blocks: sequences apart from both, on which refinement trains.
        block_epochs, e2e_epochs: passes over them, by block and end to end.
        block_rate, e2e_rate: highest learning rate, as a share of the root mean square of each tensor.
        block_tokens: tokens in a sequence; None is 256, or the model's context if that is shorter.
        batch_size: sequences in a forward pass.
        max_bytes: most bytes of text to take from the source.
        max_shard_bytes: most bytes of tensors in a file.
        seed: of the choice of calibration text.

    Raises:
        UsageError: no budget or several, keep outside (0, 1], an unknown objective, allocation, form or scope, a size
            below 1.
    """

    keep: float | None = None
    params: int | None = None
    size: int | None = None
    scope: Literal["matrices", "model"] | None = None
    objective: str = "auto"
    allocation: str | None = None
    form: str | None = None
    refine: str | None = None
    time: float | None = None
    blend: float = Options.blend
    align: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keeps: tuple[KeepRule, ...] = ()
    text: str | None = None
    calibration_blocks: int = 128
    check_blocks: int = 16
    refine_blocks: int = 512
    block_epochs: int = 2
    block_rate: float = 0.05
    e2e_epochs: int = 2
    e2e_rate: float = 0.01
    block_tokens: int | None = None
    batch_size: int = 8
    max_bytes: int | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_budget()
        choices_of: dict[str, Iterable[str]] = {
            "objective": (*OBJECTIVES, AUTO),
            "allocation": ALLOCATIONS,
            "form": (*FORMS, AUTO),
            "refine": REFINES,
            "scope": sorted(set(SCOPES.values())),
        }
        for name, choices in choices_of.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise UsageError(f'unknown {name} "{value}"', hint=did_you_mean(value, choices))
        for name, smallest in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                default = getattr(type(self), name) or {"block_tokens": 256}.get(name, 16)
                hint = f"--{name.replace('_', '-')} {default}"
                raise UsageError(f"{name} must be at least {smallest}, got {value}", hint=hint)
        if not 0 <= self.blend <= 1:
            raise UsageError(f"blend must be in [0, 1], got {self.blend:g}", hint="--blend 1")
        if self.time is not None and not self.time > 0:
            raise UsageError(f"time must be above 0 seconds, got {self.time:g}", hint="--time 10m")

    def with_defaults(self) -> CompressSettings:
        """What is None, beside an objective that is given, is what the objective is published with."""
        return replace(
            self,
            allocation=self.allocation or "uniform",
            form=self.form or "factors",
            refine=self.refine or "none",
        )

    @property
    def options(self) -> Options:
        """Numbers of the objective."""
        return Options(blend=self.blend)

    @property
    def needs_curvature(self) -> bool:
        """Whether the gradients of the outputs are asked for; auto may."""
        if self.objective == AUTO or self.allocation == "loss":
            return True
        return "output_gram" in OBJECTIVES[self.objective].needs

    @property
    def needs_refinement(self) -> bool:
        """Whether text to refine on is asked for; auto may."""
        return self.objective == AUTO if self.refine is None else self.refine != "none"

    def _check_budget(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise UsageError(
                f"{' and '.join(given) or 'no budget'}: a compression has exactly one budget, keep, params or size",
                hint="--keep 0.6 keeps 60 % of the matrices' numbers; or --params 1.2B, or --size 2.5GB, of the model",
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UsageError(
                f"keep must be in (0, 1], got {self.keep:g}: it is the fraction of the numbers that is kept",
                hint="--keep 0.6 keeps 60 % and removes 40 %",
            )
        if self.keep is None and self.amount < 1:
            raise UsageError(f"{self.budget} must be at least 1, got {self.amount}", hint=f"--{self.budget} 100M")

    @property
    def budget(self) -> str:
        """Which budget is set: keep, params or size."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def amount(self) -> float | int:
        """How much of it."""
        amount: float | int = getattr(self, self.budget)
        return amount

    @property
    def budget_scope(self) -> str:
        """What it is of: "matrices" or "model"."""
        return self.scope or SCOPES[self.budget]

    def limit(self, dense: int) -> int:
        """The budget as a number of numbers or bytes.

        Args:
            dense: of what it is of, left dense.
        """
        if self.keep is None:
            return int(self.amount)
        # As it is written: 0.29 in binary is a little less, and of 100 would be 28.
        return math.floor(Fraction(str(self.keep)) * dense)

    @property
    def budget_words(self) -> str:
        """The budget as a phrase."""
        scope = self.budget_scope
        if self.keep is not None:
            return f"{self.keep:g} of the numbers of the {scope}"
        files = "model's files" if scope == "model" else "matrices"
        return f"{self.params:,} numbers of the {scope}" if self.params else f"{self.size:,} bytes of the {files}"
