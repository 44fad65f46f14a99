"""Spectral weight decay, an option of every rule: W <- W - lr lambda polar(W) after the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowrank_kit.optim import NuMuon
from tests.linalg.cases import with_spectrum
from tests.optim.cases import RULES, gradients, newton_schulz_by_svd, steps_of

LR, SPECTRAL = 0.02, 0.8
rules = pytest.mark.parametrize("rule", RULES)


@pytest.mark.parametrize(
    ("shape", "layout"), [((8, 12), {}), ((12, 8), {"split": (5, 3), "transposed": True}), ((3, 8, 12), {})]
)
@rules
def test_decay_is_of_the_weights_after_the_step(rule: str, shape: tuple[int, ...], layout: dict[str, Any]) -> None:
    options: dict[str, Any] = {"rule": rule, "lr": LR, "weight_decay": 0.1, "rank_schedule": "fixed:0.5"}
    start, grads = torch.randn(shape), gradients(shape, 1)
    plain, decayed = (nn.Parameter(start.clone()) for _ in range(2))
    (Z,) = steps_of(NuMuon([{"params": [plain], **layout}], **options), plain, grads)
    optimizer = NuMuon([{"params": [decayed], **layout}], spectral_decay=SPECTRAL, **options)
    (W,) = steps_of(optimizer, decayed, grads)
    parts = Z.double().mT.split([5, 3]) if layout else (Z.double(),)
    D = torch.cat([newton_schulz_by_svd(part) for part in parts], dim=-2)
    # Weights up to 4 in float32; five quintics in float32 on singular values.
    torch.testing.assert_close(W.double(), Z.double() - LR * SPECTRAL * (D.mT if layout else D), atol=2e-6, rtol=0)


def test_all_singular_values_fall_alike() -> None:
    """By lr lambda times 0.67 to 1.21, where Newton-Schulz leaves those above 0.05 of the norm; not in proportion."""
    parameter = nn.Parameter(with_spectrum(8, 12, torch.tensor([8, 7, 6, 5, 4, 3, 2, 1])).float())
    before = torch.linalg.svdvals(parameter.detach())
    steps_of(NuMuon([parameter], rule="sgd", lr=0.1, spectral_decay=0.5), parameter, [torch.zeros(8, 12)])
    fell = (before - torch.linalg.svdvals(parameter.detach())) / 0.05
    assert ((fell > 0.67) & (fell < 1.21)).all()


@rules
def test_an_expert_without_tokens_does_not_decay(rule: str) -> None:
    parameter = nn.Parameter(torch.randn(3, 8, 12))
    before, (grad,) = parameter.detach().clone(), gradients((3, 8, 12), 1)
    grad[1] = 0
    steps_of(NuMuon([parameter], rule=rule, rank_schedule="fixed:0.5", spectral_decay=SPECTRAL), parameter, [grad])
    assert [torch.equal(parameter[i], before[i]) for i in range(3)] == [False, True, False]


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("shape", [(5,), ()])
def test_vectors_do_not_decay(rule: str, shape: tuple[int, ...]) -> None:
    grads = gradients(shape, 2)
    plain, decayed = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    expected = steps_of(NuMuon([plain], rule=rule), plain, grads)
    measured = steps_of(NuMuon([decayed], rule=rule, spectral_decay=SPECTRAL), decayed, grads)
    assert torch.equal(measured[-1], expected[-1])
