"""What is said of an optimizer beforehand, against what it then holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_kit.optim.footprint import state_bytes, step_bytes, step_flops
from lowrank_kit.optim.numuon import NuMuon

STEPS = 6
SHAPES = [(48, 60), (60, 48), (3, 48, 30), (40, 40)]


def optimizer_of(options: dict[str, Any], device: str = "cpu") -> NuMuon:
    params = [nn.Parameter(torch.zeros(shape, device=device)) for shape in SHAPES]
    vector = {"params": [nn.Parameter(torch.zeros(7, device=device))], "rule": "adamw"}
    matrices = {"params": params, "total_steps": STEPS, "health_every": 0, "rank_multiple": 4, **options}
    return NuMuon([matrices, vector])


def largest_state(optimizer: NuMuon) -> int:
    """Bytes of the state after each step, the most."""
    most = 0
    for _ in range(STEPS):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn_like(p)
        optimizer.step()
        most = max(most, sum(t.nbytes for state in optimizer.state.values() for t in state.values()))
    return most


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "adamw"},
        {"rule": "sgd"},
        {"rule": "muon"},
        {"rule": "muon", "momentum_dtype": "bfloat16"},
        {"topk": "warm", "rank_schedule": "fixed:0.25"},
        {"topk": "warm", "rank_schedule": "fixed:0.25", "basis_dtype": "bfloat16"},
        {"topk": "warm", "rank_schedule": "piecewise:0.1@0,0.6@0.5,0.2@0.8"},
        {"topk": "warm", "rank_schedule": "cosine:1:0.25"},
        {"topk": "warm", "rank_schedule": "fixed:0.95"},
        {"topk": "krylov", "rank_schedule": "fixed:0.25"},
        {"topk": "exact", "rank_schedule": "fixed:0.25"},
        {"topk": "filter", "rank_schedule": "fixed:0.25"},
    ],
    ids=lambda options: " ".join(options.values()),
)
def test_the_state_is_as_large_as_said(options: dict[str, Any]) -> None:
    said = state_bytes(optimizer_of(options, device="meta"))
    assert said == largest_state(optimizer_of(options))


def test_parts_and_transposed_parameters_have_bases_of_their_own() -> None:
    for layout, shape in (({"split": (16, 16, 48)}, (80, 40)), ({"transposed": True, "split": (20, 60)}, (30, 80))):
        optimizer = NuMuon([{"params": [nn.Parameter(torch.zeros(shape))], "rank_schedule": "0.5", **layout}])
        said = state_bytes(copy.deepcopy(optimizer))
        optimizer.step()
        assert said == sum(t.nbytes for state in optimizer.state.values() for t in state.values())


def test_a_step_of_one_rule_costs_more_than_of_another() -> None:
    wide = {"params": [nn.Parameter(torch.zeros(512, 2048, device="meta"))], "rank_multiple": 1}

    def flops(**options: Any) -> float:
        return step_flops(NuMuon([{**wide, **options}]))

    assert flops(rule="adamw") == flops(rule="sgd") == 0
    # Five times X X^T, its square and the polynomial times X.
    assert flops(rule="muon") == 5 * (4 * 2048 * 512**2 + 2 * 512**3)
    assert flops(rule="adamw", spectral_decay=0.1) == flops(rule="muon")
    quarter = flops(rank_schedule="0.25")
    assert quarter < flops(rank_schedule="0.25", topk="krylov") < flops(rank_schedule="0.25", topk="filter")
    assert quarter < flops(rank_schedule="0.5") < flops(rank_schedule="0.5", topk="filter")
    # A schedule counts with its mean.
    changing = flops(rank_schedule="piecewise:0.5@0,0.25@0.5", total_steps=1000)
    assert changing == pytest.approx((quarter + flops(rank_schedule="0.5")) / 2, rel=1e-3)


def test_copies_of_a_step_are_of_the_largest_batch_and_bounded() -> None:
    def copies(sides: list[int], rule: str = "muon") -> int:
        return step_bytes(NuMuon([nn.Parameter(torch.zeros(n, n, device="meta")) for n in sides], rule=rule))

    assert copies([64, 64, 8]) == 2 * copies([64]) > 0
    assert copies([4096] * 40) == copies([4096] * 4) == copies([8192])
    assert copies([64], rule="adamw") == 0
