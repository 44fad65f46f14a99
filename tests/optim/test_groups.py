"""What NuMuon refuses, with one clear error and nothing changed; and the poor matrices that it serves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.optim import NuMuon
from tests.optim.cases import RULES, TOPK, random_steps, steps_of

FIXED: dict[str, Any] = {"rank_schedule": "fixed:0.5"}


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 6), {"rule": "numuo"}, 'unknown rule "numuo" of an optimizer group\nhint: did you mean "numuon"'),
        ((4, 6), {"rule": "lion"}, "choose from: adamw, muon, numuon, sgd"),
        ((4, 6), {"topk": "exakt"}, 'unknown topk "exakt" .*\nhint: did you mean "exact"'),
        ((4, 6), {"polar": "svd"}, 'unknown polar "svd" .*\nhint: choose from: newton_schulz, polar_express'),
        ((4, 6), {"scale": "match"}, 'unknown scale "match" .*\nhint: did you mean "match_rms"'),
        ((4, 6), {"momentum_dtype": "float16"}, 'unknown momentum_dtype "float16"'),
        ((4, 6), {"basis_dtype": torch.bfloat16}, 'unknown basis_dtype "torch.bfloat16" .*\nhint: did .* "bfloat16"'),
        ((4, 6), {"lr": -0.1}, r"lr of an optimizer group must be in \[0, inf\), got -0.1"),
        ((4, 6), {"lr": float("nan")}, "lr of an optimizer group must be in .*, got nan"),
        ((4, 6), {"weight_decay": -1e-3}, r"weight_decay of .* got -0.001"),
        ((4, 6), {"spectral_decay": -1.0}, r"spectral_decay of .* got -1"),
        ((4, 6), {"momentum": 1.0}, r"momentum of an optimizer group must be in \[0, 1\), got 1"),
        ((4, 6), {"eps": -1e-8}, "eps of an optimizer group"),
        ((4, 6), {"rank_multiple": 0}, r"rank_multiple of .* in \[1, inf\), got 0"),
        ((4, 6), {"health_every": -1}, "health_every of an optimizer group"),
        ((4, 6), {"rule": "adamw", "betas": (0.9, 1.0)}, r"betas of an optimizer group must be in \[0, 1\), got 1"),
        ((4, 6), {"rank_schedule": "fixed:0"}, "rank fraction must be in"),
        ((4, 6), {"rank_schedule": "fixed:1.5"}, "rank fraction must be in"),
        ((4, 6), {"rank_schedule": "cosine:1:0.25"}, '"cosine:1:0.25" needs total_steps'),
        ((4, 6), {"rank_schedule": lambda progress: 0.5}, "that is a function needs total_steps"),
        ((4, 6), {"rank_schedule": "cosine:1:0.25", "total_steps": 0}, "total_steps must be at least 1, got 0"),
        ((4,), {}, r"rule numuon is for matrices; got parameters of shapes \[\(4,\)\]\nhint: .*adamw"),
        ((4,), {"rule": "muon"}, "rule muon is for matrices"),
        ((2, 2, 3, 3), {"rule": "muon"}, "rule muon is for matrices"),
        ((12, 6), {"split": (8, 3)}, r"1 x \(8, 3\) rows in parts of a parameter of shape \(12, 6\) with 12"),
        ((12, 6), {"split": (4, 2), "split_groups": 3}, r"3 x \(4, 2\) rows"),
        ((12, 6), {"split": (8, 4), "transposed": True}, r"of shape \(12, 6\) with 6"),
        ((12,), {"rule": "adamw", "split": (8, 4)}, r"of shape \(12,\) with 0"),
    ],
)
def test_a_group_that_cannot_be_served_is_refused_and_not_added(
    shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    bad = {"params": [nn.Parameter(torch.zeros(shape))], **FIXED, **options}
    with pytest.raises(UsageError, match=message):
        NuMuon([bad])
    optimizer = NuMuon([nn.Parameter(torch.zeros(3, 3))], rank_schedule="fixed:1")
    with pytest.raises(UsageError, match=message):
        optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 1


def test_a_parameter_in_two_groups_or_twice_in_one_is_refused() -> None:
    one, other = (nn.Parameter(torch.randn(4, 6)) for _ in range(2))
    message = r"1 parameters are in two groups, or twice in one; the first has shape \(4, 6\)"
    for groups in ([one, other, one], [{"params": one}, {"params": [other, one]}], [("a", one), ("b", one)]):
        with pytest.raises(UsageError, match=message):
            NuMuon(groups, **FIXED)
    optimizer = NuMuon([one], **FIXED)
    with pytest.raises(UsageError, match=message):
        optimizer.add_param_group({"params": iter([other, one])})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": iter([other])})
    random_steps(optimizer, [one, other], range(1))


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_a_function_that_gives_no_fraction_is_refused_before_any_weight_moves(fraction: float) -> None:
    params = [nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    groups = [{"params": [params[0]], "rule": "muon"}, {"params": [params[1]]}]
    optimizer = NuMuon(groups, rank_schedule=lambda progress: fraction if progress else 0.5, total_steps=10)
    random_steps(optimizer, params, range(1))
    before = [p.detach().clone() for p in params]
    with pytest.raises(UsageError, match=rf"gave a fraction of {fraction:g} at progress 0.1, outside \(0, 1\]"):
        random_steps(optimizer, params, range(1, 2))
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("where", range(len(RULES)), ids=RULES)
def test_a_gradient_that_is_not_finite_is_refused_and_nothing_moves(where: int, named: bool, bad: float) -> None:
    params = [nn.Parameter(torch.randn(6, 9 + i)) for i in range(len(RULES))]
    groups = [
        {"params": [(f"weight.{i}", p) if named else p], "rule": rule, **FIXED}
        for i, (p, rule) in enumerate(zip(params, RULES, strict=True))
    ]
    optimizer = NuMuon(groups)
    random_steps(optimizer, params, range(2))
    weights, state = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict())
    for parameter in params:
        parameter.grad = torch.randn_like(parameter)
    gradient = params[where].grad
    assert gradient is not None
    gradient[3, 4] = bad
    with pytest.raises(LowRankError, match="is not finite at step 2") as caught:
        optimizer.step()
    assert f"shape (6, {9 + where})" in caught.value.message
    assert (f"weight.{where}" in caught.value.message) == named
    assert caught.value.hint
    assert all(torch.equal(parameter, old) for parameter, old in zip(params, weights, strict=True))
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert after["state"].keys() == state["state"].keys() == set(range(len(RULES)))
    for index, tensors in state["state"].items():
        assert all(torch.equal(after["state"][index][name], old) for name, old in tensors.items())


@pytest.mark.parametrize(
    ("rule", "topk"), [*(("numuon", topk) for topk in TOPK), *((rule, "warm") for rule in RULES[1:])]
)
@pytest.mark.parametrize(
    "grad",
    [
        torch.zeros(0, 9),
        torch.zeros(9, 0),
        torch.zeros(0, 4, 6),
        torch.arange(1.0, 10.0)[None],
        torch.arange(1.0, 10.0)[:, None],
        torch.ones(1, 1),
        torch.zeros(6, 9),
        torch.zeros(64, 96),
        torch.outer(torch.arange(9.0), torch.arange(6.0)),
        torch.outer(torch.arange(64.0), torch.arange(96.0)),
        torch.outer(torch.arange(64.0), torch.arange(96.0)) * 1e-30,
        torch.full((64, 64), 1e18),
        torch.eye(6, 9),
    ],
    ids=lambda grad: f"{tuple(grad.shape)} peak {grad.abs().max().item() if grad.numel() else 0:g}",
)
def test_weights_stay_finite(grad: Tensor, rule: str, topk: str) -> None:
    """Empty, of one row, zero, of rank one, at the ends of float32's range, with equal singular values."""
    parameter = nn.Parameter(torch.full(grad.shape, 0.1))
    options: dict[str, Any] = {"rule": rule, "topk": topk, "spectral_decay": 0.1, "rank_schedule": "cosine:1:0.25"}
    optimizer = NuMuon([parameter], lr=1e-3, total_steps=4, health_every=1, **options)
    for weight in steps_of(optimizer, parameter, [grad] * 6):
        assert weight.isfinite().all()
        if rule != "sgd":  # whose steps are as large as its gradients
            assert not weight.numel() or (weight - 0.1).abs().max() < 0.1


@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_scaler_in_half_precision_skips_what_overflows(rule: str) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(8, 12))
    optimizer = NuMuon([parameter], rule=rule, lr=1e-2, rank_schedule="fixed:0.5")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=3)
    x, moved, scales = torch.randn(16, 12), [], []
    for _ in range(12):
        before = parameter.detach().clone()
        scales.append(scaler.get_scale())
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (x @ parameter.mT).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(not torch.equal(parameter, before))
        assert parameter.isfinite().all()
    assert not moved[0]
    assert sum(moved) > 3
    # A step that was skipped halved the scale, and is no step of the schedule.
    assert [scales[i + 1] < scales[i] for i in range(11)] == [not step for step in moved[:11]]
    assert optimizer.param_groups[0]["step"] == sum(moved)
