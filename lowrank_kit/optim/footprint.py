"""What an optimizer will hold in memory and how much it will compute, from shapes alone: no step is taken.

Shape legend: a matrix has sides L = max(out, in) and S = min(out, in); b columns span the subspace of a rank-k step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_kit.linalg.polar import NEWTON_SCHULZ_STEPS, POLAR_EXPRESS_STEPS
from lowrank_kit.linalg.subspace import KRYLOV_BLOCKS, KRYLOV_OVERSAMPLING, basis_columns
from lowrank_kit.linalg.topk import rank_of_fraction
from lowrank_kit.optim.modes import FULL_RANK_FRACTION
from lowrank_kit.optim.numuon import NuMuon
from lowrank_kit.optim.rules import BATCH_ELEMENTS, MATRIX_RULES, layout_of
from lowrank_kit.optim.schedule import fraction_at

# Points of a rank schedule that are looked at: every step of a shorter run.
_POINTS = 1000
# Copies of a batch of matrices that a matrix rule makes in a step, in float32: measured on the CPU 8 at rank fraction
# 0.25, 10 to 17 at 0.7, 11 of muon and 8 of spectral decay alone; the other rules work in place.
_STEP_COPIES, _DECAY_COPIES = 12, 8
# Polar factors of the mode filter in a step, of 8 steps each: of the momentum, and of about 8 trials of a threshold.
_FILTER_POLARS, _FILTER_STEPS = 9, 8


def state_bytes(optimizer: NuMuon) -> int:
    """Bytes of the optimizer's state at its largest: exact, as long as the health figure lets oversampling be.

    Args:
        optimizer: its parameters may be on the meta device.
    """
    return sum(_state(group, p) for group in optimizer.param_groups for p in group["params"])


def step_bytes(optimizer: NuMuon) -> int:
    """About the most bytes a step takes beside the state, for a while: the copies of its largest batch of matrices."""
    most = 0
    for group in optimizer.param_groups:
        copies = _STEP_COPIES if group["rule"] in MATRIX_RULES else _DECAY_COPIES if group["spectral_decay"] else 0
        numbers: dict[torch.Size, int] = {}
        for p in group["params"]:
            numbers[p.shape] = numbers.get(p.shape, 0) + p.numel()
        for shape, together in numbers.items():
            most = max(most, 4 * copies * min(together, max(BATCH_ELEMENTS, shape.numel())))
    return most


def step_flops(optimizer: NuMuon) -> float:
    """Multiplications and additions of a step in products and factorizations of matrices, a mean over the schedule."""
    return sum(
        _matrix_flops(group, shape, fractions)
        for group in optimizer.param_groups
        for fractions in [_fractions(group)[:: _POINTS // 20]]
        for p in group["params"]
        for shape in _shapes(group, p)
    )


def _state(group: dict[str, Any], p: Tensor) -> int:
    size = torch.promote_types(p.dtype, torch.float32).itemsize
    if group["rule"] == "adamw":
        return 2 * size * p.numel() + torch.float32.itemsize  # the count of steps is a number of its own
    if group["rule"] == "sgd":
        return size * p.numel()
    return getattr(torch, group["momentum_dtype"]).itemsize * p.numel() + _memory(group, p)


def _memory(group: dict[str, Any], p: Tensor) -> int:
    """Bytes of what the mode of the rank-k step keeps, as `make_memory` makes it."""
    truncated = [fraction for fraction in _fractions(group) if fraction < FULL_RANK_FRACTION]
    if group["rule"] != "numuon" or not truncated:
        return 0
    shapes = list(_shapes(group, p))
    if group["topk"] == "filter":
        return sum(torch.float32.itemsize * math.prod(shape[:-2]) for shape in shapes)
    if group["topk"] != "warm":
        return 0
    size = getattr(torch, group["basis_dtype"]).itemsize
    return sum(size * math.prod(s[:-2]) * min(s[-2:]) * _columns(group, s, max(truncated)) for s in shapes)


def _columns(group: dict[str, Any], shape: torch.Size, fraction: float) -> int:
    k = rank_of_fraction(fraction, shape, multiple=group["rank_multiple"])
    return basis_columns(k, min(shape[-2:]), group["oversampling"])


def _fractions(group: dict[str, Any]) -> list[float]:
    """Rank fractions of the schedule, step by step or at evenly spaced steps."""
    if group["rule"] != "numuon":
        return [1.0]
    total = group["total_steps"] or 1
    points = min(total, _POINTS)
    return [fraction_at(group["rank_schedule"], (point * total // points) / total) for point in range(points)]


def _shapes(group: dict[str, Any], p: Tensor) -> Iterator[torch.Size]:
    """Shapes of what is stepped as one, [..., out, in]; a vector has none."""
    if p.ndim > 1:
        yield from (part.shape for part in layout_of(group).parts(torch.empty(p.shape, device="meta")))


def _matrix_flops(group: dict[str, Any], shape: torch.Size, fractions: Sequence[float]) -> float:
    total = _polar(shape, NEWTON_SCHULZ_STEPS) if group["spectral_decay"] else 0.0
    if group["rule"] == "muon":
        steps = NEWTON_SCHULZ_STEPS if group["polar"] == "newton_schulz" else POLAR_EXPRESS_STEPS
        total += _polar(shape, steps)
    elif group["rule"] == "numuon":
        total += sum(_numuon(group, shape, fraction) for fraction in fractions) / len(fractions)
    return math.prod(shape[:-2]) * total


def _numuon(group: dict[str, Any], shape: torch.Size, fraction: float) -> float:
    if fraction >= FULL_RANK_FRACTION:
        return _polar(shape, POLAR_EXPRESS_STEPS)
    S, L = sorted(shape[-2:])
    k = rank_of_fraction(fraction, shape, multiple=group["rank_multiple"])
    if group["topk"] == "filter":
        return _polar(shape, _FILTER_STEPS) + _FILTER_POLARS * _polar(torch.Size((S, S)), _FILTER_STEPS)
    c = KRYLOV_BLOCKS * (k + KRYLOV_OVERSAMPLING)
    if group["topk"] == "krylov" and c < S:
        # M^T M B of both blocks and M Q, the exact step of M Q, and that times Q^T.
        return 6 * L * S * c + 4 * S * c**2 + _exact(L, c, k) + 2 * L * S * c
    if group["topk"] != "warm":
        return _exact(L, S, k)
    b = _columns(group, shape, fraction)
    products = 4 * L * S * b + 2 * S * b**2 + 2 * S * b**2 + 2 * L * b * k + 2 * L * S * k
    return products + 3 * (L + S) * b**2 + _eigh(b)


def _polar(shape: torch.Size, steps: int) -> float:
    """Quintic iterations: X X^T, its square, and the polynomial times X."""
    S, L = sorted(shape[-2:])
    return steps * (4 * L * S**2 + 2 * S**3)


def _exact(L: int, S: int, k: int) -> float:
    return 2 * L * S**2 + _eigh(S) + 4 * L * S * k


def _eigh(side: int) -> float:
    """Golub, Van Loan, Matrix Computations (4th edition), section 8.3: about 9 n^3 with eigenvectors."""
    return 9 * side**3
