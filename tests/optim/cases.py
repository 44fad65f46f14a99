"""Gradients, steps and slow formulas that the tests of the optimizer share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

RULES = ("numuon", "muon", "adamw", "sgd")
MATRIX_RULES = RULES[:2]
TOPK = ("warm", "krylov", "exact", "filter")


def gradients(shape: tuple[int, ...], steps: int = 6) -> list[Tensor]:
    """New noise in each step: what the past weighs and what the present shows in every direction."""
    return [torch.randn(shape) for _ in range(steps)]


def steps_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grads: Sequence[Tensor]) -> list[Tensor]:
    """The weights after each step."""
    weights = []
    for grad in grads:
        parameter.grad = grad.to(parameter.dtype, copy=True)
        optimizer.step()
        weights.append(parameter.detach().clone())
    return weights


def random_steps(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], steps: range) -> None:
    """Steps whose gradients hang on their number alone."""
    for step in steps:
        torch.manual_seed(100 + step)
        for parameter in params:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def newton_schulz_by_svd(M: Tensor) -> Tensor:
    """Muon's direction worked out on the singular values, which is all that the iteration changes."""
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (U * s[..., None, :]) @ Vh


def topk_polar_by_svd(M: Tensor, fraction: float) -> Tensor:
    """NuMuon's direction, and its rank from the definition."""
    k = math.ceil(fraction * min(M.shape[-2:]) - 1e-9)
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[..., :k] @ Vh[..., :k, :]
