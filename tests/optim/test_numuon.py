"""The steps of NuMuon, Muon, AdamW and SGD: against slow formulas and against torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_kit.optim import NuMuon, RankSchedule, parameter_groups, rules
from tests.families import build, token_ids
from tests.optim.cases import (
    MATRIX_RULES,
    RULES,
    TOPK,
    gradients,
    newton_schulz_by_svd,
    random_steps,
    steps_of,
    topk_polar_by_svd,
)

LR, DECAY, MOMENTUM, STEPS = 0.02, 0.1, 0.95, 6
# The last: more experts than a side is long.
SHAPES = [(8, 12), (12, 8), (9, 9), (13, 8, 12)]


def slow_reference(W: Tensor, grads: list[Tensor], *, rule: str, nesterov: bool, schedule: str) -> list[Tensor]:
    """The formula of the docstring, in float64 with an SVD."""
    W, M = W.double(), torch.zeros_like(W, dtype=torch.float64)
    weights = []
    for step, grad in enumerate(grads):
        G = grad.double()
        M = MOMENTUM * M + (1 - MOMENTUM) * G
        towards = (1 - MOMENTUM) * G + MOMENTUM * M if nesterov else M
        fraction = RankSchedule.parse(schedule).fraction(step / STEPS)
        D = newton_schulz_by_svd(towards) if rule == "muon" else topk_polar_by_svd(towards, fraction)
        W = (1 - LR * DECAY) * W - LR * 0.2 * math.sqrt(max(W.shape[-2:])) * D
        weights.append(W)
    return weights


@pytest.mark.parametrize("nesterov", [None, False, True])
@pytest.mark.parametrize(("rule", "topk"), [("muon", "warm"), *(("numuon", topk) for topk in TOPK if topk != "filter")])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_the_formula(shape: tuple[int, ...], rule: str, topk: str, nesterov: bool | None) -> None:
    """On so small a side the subspaces of warm and krylov are the whole space, so that both are exact."""
    schedule = "cosine:0.8:0.25"
    parameter, grads = nn.Parameter(torch.randn(shape)), gradients(shape, STEPS)
    sure = rule == "muon" if nesterov is None else nesterov
    expected = slow_reference(parameter.detach(), grads, rule=rule, nesterov=sure, schedule=schedule)
    options: dict[str, Any] = {"rule": rule, "topk": topk, "nesterov": nesterov, "rank_schedule": schedule}
    optimizer = NuMuon([parameter], lr=LR, weight_decay=DECAY, momentum=MOMENTUM, total_steps=STEPS, **options)
    for measured, exact in zip(steps_of(optimizer, parameter, grads), expected, strict=True):
        # Steps of 0.02 in weights of order one: float32 rounds each weight to 1e-7 and each direction to 1e-6, and
        # warm's eigenvectors of a float32 Gram turn by 1e-5 where two singular values are close.
        torch.testing.assert_close(measured.double(), exact, atol=3e-6 if topk == "warm" else 1e-6, rtol=1e-6)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (8, 24)])
def test_muon_takes_the_steps_of_torch(shape: tuple[int, int], nesterov: bool) -> None:
    """torch.optim.Muon with Moonlight's scale. Its Newton-Schulz runs in bfloat16, ours in float32 on a CPU.

    A product rounded to 8 bits of mantissa is off by up to 0.4 %, and fifteen of them in a row by up to 2 % of the
    step: worst of 30 seeds, 1.7 % in its norm and a cosine of 0.9994. No square shapes: their least singular value is
    near zero and rises up to 500-fold, and its rounding with it. Another convention for momentum or Nesterov shows
    from the second step on, in the direction.
    """
    start, grads = torch.randn(shape), gradients(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM, "nesterov": nesterov}
    measured = [start, *steps_of(NuMuon([ours], rule="muon", **options), ours, grads)]
    torchs = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    expected = [start, *steps_of(torchs, theirs, grads)]
    for step in range(STEPS):
        moved, moved_by_torch = (W[step + 1] - (1 - LR * DECAY) * W[step] for W in (measured, expected))
        cosine = torch.nn.functional.cosine_similarity(moved.flatten(), moved_by_torch.flatten(), dim=0).item()
        assert cosine > 0.999
        assert moved.norm().item() == pytest.approx(moved_by_torch.norm().item(), rel=0.02)


def direction_of(shape: tuple[int, ...], grad: Tensor, **options: Any) -> Tensor:
    """The step of a fresh optimizer from zero, at a learning rate of one, without its sign."""
    parameter = nn.Parameter(torch.zeros(shape))
    return -steps_of(NuMuon([parameter], lr=1.0, **options), parameter, [grad])[0]


@pytest.mark.parametrize(
    "options",
    [
        {"rank_schedule": "fixed:1"},
        {"rank_schedule": "fixed:0.9", "topk": "exact"},
        {"rule": "muon", "polar": "polar_express"},
    ],
)
@pytest.mark.parametrize("shape", [(24, 32), (32, 24), (3, 24, 32)])
def test_a_step_of_full_rank_is_the_polar_factor_within_a_percent(
    shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    (grad,) = gradients(shape, 1)
    U, _, Vh = torch.linalg.svd(grad, full_matrices=False)
    core = U.mT @ direction_of(shape, grad, scale="none", **options) @ Vh.mT
    # Polar Express: singular values above 1e-3 of the norm within 1 %, and these are; its vectors are those of M.
    torch.testing.assert_close(core, torch.eye(24).expand_as(core), atol=0.01, rtol=0)
    assert (core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("fraction", "multiple", "rank"),
    # A multiple counts where the side has 16 of it: not 8 in 64.
    [(0.27, 1, 18), (0.27, 4, 20), (0.24, 4, 16), (0.27, 8, 18), (0.01, 4, 4), (0.89, 4, 56), (0.9, 4, 64)],
)
@pytest.mark.parametrize("topk", ["warm", "krylov", "exact"])
def test_rank_and_singular_values_of_a_step(topk: str, fraction: float, multiple: int, rank: int) -> None:
    options = {"topk": topk, "rank_schedule": f"fixed:{fraction}", "rank_multiple": multiple, "scale": "none"}
    values = torch.linalg.svdvals(direction_of((64, 96), torch.randn(64, 96), **options))
    # Products in float32; at a fraction of 0.9 or more, Polar Express.
    torch.testing.assert_close(values[:rank], torch.ones(rank), atol=0.01 if rank == 64 else 1e-5, rtol=0)
    assert (values[rank:] < 1e-5).all()


@pytest.mark.parametrize(
    ("scale", "factor"), [("match_rms", 0.2 * math.sqrt(48)), ("spectral", math.sqrt(16 / 48)), ("none", 1.0)]
)
@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_scale_of_a_step(rule: str, scale: str, factor: float) -> None:
    options = {"rule": rule, "rank_schedule": "fixed:0.25", "scale": scale, "nesterov": False}
    (grad,) = gradients((16, 48), 1)
    expected = newton_schulz_by_svd(grad.double()) if rule == "muon" else topk_polar_by_svd(grad.double(), 0.25)
    measured = direction_of((16, 48), grad, **options)
    torch.testing.assert_close(measured.double(), factor * expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize(("fraction", "rms"), [(1.0, 0.2), (0.25, 0.1)])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_a_full_step_is_as_large_as_one_of_adamw_and_a_lower_rank_is_not_scaled_back(
    shape: tuple[int, int], fraction: float, rms: float
) -> None:
    """RMS 0.2 sqrt(max) sqrt(k) / sqrt(m n) = 0.2 sqrt(k / min); Polar Express is within 1 % of it."""
    moved = direction_of(shape, torch.randn(shape), rank_schedule=f"fixed:{fraction}")
    assert moved.square().mean().sqrt().item() == pytest.approx(rms, rel=0.01 if fraction == 1 else 1e-5)
    assert torch.linalg.matrix_rank(moved) == 16 * fraction


ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1}
SGD: dict[str, Any] = {"lr": 1e-2, "momentum": 0.9}


@pytest.mark.parametrize(
    ("rule", "options", "torchs"),
    [
        ("adamw", ADAMW, torch.optim.AdamW),
        ("sgd", SGD, torch.optim.SGD),
        ("sgd", SGD | {"nesterov": True}, torch.optim.SGD),
        ("sgd", {"lr": 1e-2, "momentum": 0.0}, torch.optim.SGD),
    ],
)
def test_adamw_and_sgd_are_torchs_bit_for_bit(
    rule: str, options: dict[str, Any], torchs: Callable[..., torch.optim.Optimizer]
) -> None:
    shapes = [(6, 4), (5,), (2, 3, 3, 3), ()]
    ours, theirs = ([nn.Parameter(torch.full(shape, 0.3)) for shape in shapes] for _ in range(2))
    random_steps(NuMuon(ours, rule=rule, **options), ours, range(5))
    random_steps(torchs(theirs, **options), theirs, range(5))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_weight_decay_is_decoupled(rule: str) -> None:
    """After one step from the same weights, the difference is lr wd W and the state is the same."""
    options: dict[str, Any] = {"rule": rule, "lr": LR, "rank_schedule": "fixed:0.5"}
    start, grads = torch.randn(8, 12), gradients((8, 12), 1)
    plain, decayed = (nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [NuMuon([plain], **options), NuMuon([decayed], weight_decay=DECAY, **options)]
    (W,), (W_decayed,) = (steps_of(o, p, grads) for o, p in zip(optimizers, (plain, decayed), strict=True))
    # Weights up to 4 are rounded to 2.4e-7 in either.
    torch.testing.assert_close(W - W_decayed, LR * DECAY * start, atol=5e-7, rtol=0)
    one, other = optimizers[0].state[plain], optimizers[1].state[decayed]
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_schedule_is_at_step_over_total_steps() -> None:
    parameter = nn.Parameter(torch.zeros(8, 8))
    optimizer = NuMuon([parameter], lr=1.0, rank_schedule="piecewise:1@0,0.5@0.25,0.25@0.5", total_steps=8)
    used, ranks, before = [], [], torch.zeros(8, 8)
    for grad in gradients((8, 8), 10):
        (weight,) = steps_of(optimizer, parameter, [grad])
        used.append(optimizer.param_groups[0]["rank_fraction"])
        ranks.append(int(torch.linalg.matrix_rank(weight - before, rtol=1e-4)))
        before = weight
    assert used == [1.0] * 2 + [0.5] * 2 + [0.25] * 6  # past the end it stays
    assert ranks == [8] * 2 + [4] * 2 + [2] * 6


def test_a_schedule_may_be_a_function_of_progress() -> None:
    seen = []

    def falling(progress: float) -> float:
        seen.append(progress)
        return 1 - progress / 2

    parameter = nn.Parameter(torch.zeros(8, 8))
    steps_of(NuMuon([parameter], rank_schedule=falling, total_steps=4), parameter, gradients((8, 8), 6))
    assert seen == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("topk", TOPK)
@pytest.mark.parametrize("rule", MATRIX_RULES)
def test_batches_of_any_size_take_the_same_steps(rule: str, topk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in a side of 64, where a subspace of 42 columns shows which random ones it began with."""
    results = []
    for elements in (rules.BATCH_ELEMENTS, 2 * 64 * 64, 1):
        monkeypatch.setattr(rules, "BATCH_ELEMENTS", elements)
        params = [nn.Parameter(torch.zeros(shape)) for shape in [(64, 64), (64, 96), (64, 64), (5, 9), (64, 64)]]
        options: dict[str, Any] = {"rule": rule, "topk": topk, "rank_schedule": "fixed:0.3", "scale": "none"}
        random_steps(NuMuon(params, lr=LR, spectral_decay=0.1, **options), params, range(3))
        results.append(params)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            # Entries of 1e-3 a step; batched and single products may sum in another order.
            torch.testing.assert_close(one, two, atol=2e-6, rtol=0)


def test_a_parameter_without_a_gradient_stays() -> None:
    params = [nn.Parameter(torch.randn(6, 9)) for _ in RULES]
    before = [p.detach().clone() for p in params]
    groups = [{"params": [p], "rule": rule} for p, rule in zip(params, RULES, strict=True)]
    optimizer = NuMuon(groups, weight_decay=DECAY, spectral_decay=DECAY, rank_schedule="fixed:0.5")
    optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(params, before, strict=True))
    params[1].grad = torch.randn(6, 9)
    optimizer.step()
    moved = [not torch.equal(parameter, old) for parameter, old in zip(params, before, strict=True)]
    assert moved == [False, True, False, False]


def test_a_closure_is_evaluated_with_gradients_and_its_loss_comes_back() -> None:
    parameter = nn.Parameter(torch.randn(4, 6))
    optimizer = NuMuon([parameter], rank_schedule="fixed:1")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second.item() < first.item()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_training_lowers_the_loss(family: str, rule: str) -> None:
    """Thirty steps on one batch: from chance, ln 100 = 4.6 nats or more, to half of it."""
    model = build(family).train()
    lr = 1e-1 if rule == "sgd" else 1e-2
    optimizer = NuMuon(parameter_groups(model, rule=rule, lr=lr, adamw_lr=1e-2, rank_schedule="fixed:0.5"))
    ids = token_ids(batch=2, length=12)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 4
    assert losses[-1] < losses[0] / 2
