"""Effective rank of the matrices while they train, measured so seldom and so few that it takes 1 % of the time."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowrank_kit.errors import NonFiniteError
from lowrank_kit.linalg.spectrum import effective_rank, singular_values_of_gram, stable_rank
from lowrank_kit.matrices import Matrix, find_matrices, token_share

logger = logging.getLogger(__name__)

# Share of the work of training that measuring may take.
SHARE = 0.01
# What a matrix with smaller side S costs, in floating point operations of training: a S^3 + b. Eigenvalues in float64
# run far below the speed of training: measured on a CPU with the presets; for a GPU an estimate.
COSTS = {"cpu": (60.0, 5e6), "cuda": (3e4, 1e11)}


@dataclass(frozen=True)
class RankPlan:
    """Which matrices are measured, and how often. It follows from the model and the settings, not from a clock.

    Args:
        every: steps from one measurement to the next.
        matrices: those that are measured each time, in model order.
    """

    every: int
    matrices: tuple[Matrix, ...]


def plan_ranks(matrices: Sequence[Matrix], step_flops: float, every: int, device: str) -> RankPlan:
    """As many matrices of each role as 1 % of the work of `every` steps pays for, spread over the depth.

    Where it does not pay for one of each role, one of each is measured at a multiple of `every`.

    Args:
        matrices: of the model.
        step_flops: floating point operations of a training step, on one device.
        every: least number of steps between two measurements.
        device: type of the device, `cpu`, `cuda` or `mps`.
    """
    scale, fixed = COSTS.get(device, COSTS["cpu"])
    roles: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        roles.setdefault(matrix.role, []).append(matrix)
    one_of_each = sum(max(scale * min(m.shape) ** 3 + fixed for m in members) for members in roles.values())
    budget = SHARE * step_flops * every
    count = max(1, int(budget / one_of_each))
    chosen = {matrix.name for members in roles.values() for matrix in _spread(members, count)}
    return RankPlan(
        every * max(1, math.ceil(one_of_each / budget)), tuple(matrix for matrix in matrices if matrix.name in chosen)
    )


def training_flops(model: PreTrainedModel, matrices: Sequence[Matrix], tokens: int) -> float:
    """Floating point operations of a training step in the matrices: 6 for each number that a token meets.

    Args:
        model: whose config says how many experts a token meets.
        matrices: of the model.
        tokens: in a step.
    """
    return 6.0 * tokens * sum(math.prod(matrix.shape) * token_share(model, matrix) for matrix in matrices)


@torch.no_grad()
def mean_ranks(model: nn.Module, matrices: Iterable[Matrix]) -> dict[str, dict[str, float]]:
    """Effective and stable rank as shares of min(out, in), means over the given matrices of each role.

    A sharded parameter is gathered, so every process of a sharded run has to call this, with the same matrices.

    Args:
        model: holds the matrices.
        matrices: those to measure, the experts of a parameter side by side.

    Returns:
        effective_rank and stable_rank -> role -> share.

    Raises:
        NonFiniteError: a matrix holds NaN or Inf.
    """
    found: dict[str, dict[str, list[float]]] = {"effective_rank": {}, "stable_rank": {}}
    parameters = dict(model.named_parameters())
    for name, members in groupby(matrices, key=lambda matrix: matrix.parameter):
        W = _whole(parameters[name])
        for matrix in members:
            s_S = _singular_values(W if matrix.expert is None else W[matrix.expert], matrix.name)
            for key, rank in (("effective_rank", effective_rank(s_S)), ("stable_rank", stable_rank(s_S))):
                found[key].setdefault(matrix.role, []).append(rank / len(s_S))
    return {key: {role: sum(shares) / len(shares) for role, shares in roles.items()} for key, roles in found.items()}


class EffectiveRanks(TrainerCallback):
    """Adds the ranks of the matrices to the log, by role: `effective_rank/ROLE` and `stable_rank/ROLE`.

    Must stand before what writes a log: it asks for a log line and puts its figures into the numbers of that line.

    Args:
        every: steps between two measurements, see `plan_ranks`.
        step_tokens: tokens in an optimizer step, on one device.
    """

    def __init__(self, every: int, step_tokens: int) -> None:
        self.every = every
        self.step_tokens = step_tokens
        self.figures: dict[str, float] = {}
        self.started, self.seconds = 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose what is measured and when, and say it."""
        model = kwargs["model"]
        matrices = find_matrices(model)
        flops = training_flops(model, matrices, self.step_tokens)
        self.plan = plan_ranks(matrices, flops, self.every, args.device.type)
        told = f"effective rank: {len(self.plan.matrices)} of {len(matrices)} matrices every {self.plan.every} steps"
        if self.plan.every == self.every:
            logger.info(told)
        else:
            logger.warning(f"{told}; every {self.every} steps it would take more than {SHARE:.0%} of the training")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, at the first step."""
        self.started = self.started or time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure at the steps of the plan, and have a line logged there."""
        if state.global_step % self.plan.every:
            return
        if args.device.type == "cuda":
            torch.cuda.synchronize()  # or the end of the step would be counted too
        started = time.perf_counter()
        try:
            ranks = mean_ranks(kwargs["model"], self.plan.matrices)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error.message} at step {state.global_step}", hint=error.hint) from None
        self.seconds += time.perf_counter() - started
        self.figures = {f"{key}/{role}": share for key, roles in ranks.items() for role, share in roles.items()}
        self.figures["spectra_share"] = round(self.seconds / (time.perf_counter() - self.started), 5)
        control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the figures of this step into the numbers that are logged."""
        if logs is not None and "loss" in logs:
            logs.update(self.figures)
            self.figures = {}


def by_role(logs: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The ranks among the numbers of a log line: effective_rank and stable_rank -> role -> share, if there are any."""
    found: dict[str, dict[str, float]] = {}
    for key, share in logs.items():
        figure, _, role = key.partition("/")
        if role and figure in ("effective_rank", "stable_rank"):
            found.setdefault(figure, {})[role] = share
    return found


def _spread(members: Sequence[Matrix], count: int) -> Sequence[Matrix]:
    """`count` of them at equal distances, each in the middle of its stretch; all where there are no more."""
    if count >= len(members):
        return members
    return [members[(2 * i + 1) * len(members) // (2 * count)] for i in range(count)]


def _whole(parameter: Tensor) -> Tensor:
    W = parameter.detach()
    W = W.full_tensor() if hasattr(W, "full_tensor") else W
    return W.cpu() if W.device.type == "mps" else W  # which has no float64


def _singular_values(W: Tensor, name: str) -> Tensor:
    if not W.isfinite().all():
        raise NonFiniteError(f"the matrix {name} is not finite", hint="lower the learning rate")
    return singular_values_of_gram(W)
