"""NuMuon, Muon and AdamW: against slow references, against torch's own, and through save and load."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_kit.errors import LowRankError, UsageError
from lowrank_kit.optim import NuMuon, RankSchedule, parameter_groups
from tests.families import build, token_ids

LR, DECAY, MOMENTUM, STEPS = 0.02, 0.1, 0.95, 6
# The last: more experts than a side is long.
SHAPES = [(8, 12), (12, 8), (9, 9), (13, 8, 12)]


def gradients(shape: tuple[int, ...], steps: int = STEPS) -> list[Tensor]:
    """New noise in each step: what the past weighs and what the present shows in every direction."""
    return [torch.randn(shape) for _ in range(steps)]


def steps_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grads: list[Tensor]) -> list[Tensor]:
    """The weights after each step."""
    weights = []
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
        weights.append(parameter.detach().clone())
    return weights


def newton_schulz_by_svd(M: Tensor) -> Tensor:
    """Muon's direction worked out on the singular values, which is all that the iteration changes."""
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (U * s[..., None, :]) @ Vh


def slow_reference(
    W: Tensor, grads: list[Tensor], *, rule: str, nesterov: bool, schedule: str, total_steps: int
) -> list[Tensor]:
    """The formula of the docstring, in float64 with an SVD."""
    W, M = W.double(), torch.zeros_like(W, dtype=torch.float64)
    weights = []
    for step, grad in enumerate(grads):
        G = grad.double()
        M = MOMENTUM * M + (1 - MOMENTUM) * G
        towards = (1 - MOMENTUM) * G + MOMENTUM * M if nesterov else M
        if rule == "muon":
            D = newton_schulz_by_svd(towards)
        else:
            m, n = W.shape[-2:]
            k = math.ceil(RankSchedule.parse(schedule).fraction(step / total_steps) * min(m, n) - 1e-9)
            U, _, Vh = torch.linalg.svd(towards, full_matrices=False)
            D = U[..., :k] @ Vh[..., :k, :]
        W = (1 - LR * DECAY) * W - LR * 0.2 * math.sqrt(max(W.shape[-2:])) * D
        weights.append(W)
    return weights


@pytest.mark.parametrize("nesterov", [None, False, True])
@pytest.mark.parametrize("rule", ["numuon", "muon"])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_the_formula(shape: tuple[int, ...], rule: str, nesterov: bool | None) -> None:
    schedule = "cosine:1:0.25"
    parameter = nn.Parameter(torch.randn(shape))
    grads = gradients(shape)
    expected = slow_reference(
        parameter.detach(),
        grads,
        rule=rule,
        nesterov=rule == "muon" if nesterov is None else nesterov,
        schedule=schedule,
        total_steps=STEPS,
    )
    optimizer = NuMuon(
        [parameter],
        lr=LR,
        rule=rule,
        weight_decay=DECAY,
        momentum=MOMENTUM,
        nesterov=nesterov,
        rank_schedule=schedule,
        total_steps=STEPS,
    )
    for measured, exact in zip(steps_of(optimizer, parameter, grads), expected, strict=True):
        # Steps of 0.02 in weights of order one: float32 rounds each weight to 1e-7 and each direction to 1e-6.
        torch.testing.assert_close(measured.double(), exact, atol=1e-6, rtol=1e-6)


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


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_numuon_of_full_rank_is_the_polar_factor_of_torchs_muon(shape: tuple[int, int]) -> None:
    """Newton-Schulz leaves U S' V^T with S' in about [0.65, 1.2]; ours is U V^T of the same momentum.

    So ours^T theirs = V S' V^T: symmetric up to bfloat16, with the eigenvalues S'.
    """
    ours, theirs = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    grads = gradients(shape, steps=3)
    numuon = NuMuon([ours], lr=1.0, nesterov=True, rank_schedule="fixed:1")
    D = steps_of(numuon, ours, grads)
    muon = torch.optim.Muon([theirs], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    N = steps_of(muon, theirs, grads)
    scale = 0.2 * math.sqrt(24)
    polar, approximate = (D[2] - D[1]) / -scale, (N[2] - N[1]) / -scale
    torch.testing.assert_close(torch.linalg.svdvals(polar), torch.ones(8), atol=1e-5, rtol=0)
    core = polar.mT @ approximate if shape[0] > shape[1] else polar @ approximate.mT
    assert (core - core.mT).abs().max() < 0.02
    eigenvalues = torch.linalg.eigvalsh((core + core.mT) / 2)
    assert eigenvalues.min() > 0.65
    assert eigenvalues.max() < 1.2
    cosine = torch.nn.functional.cosine_similarity(polar.flatten(), approximate.flatten(), dim=0)
    assert cosine > 0.97


@pytest.mark.parametrize(("fraction", "rms"), [(1.0, 0.2), (0.25, 0.1)])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_a_full_step_is_as_large_as_one_of_adamw_and_a_lower_rank_is_not_scaled_back(
    shape: tuple[int, int], fraction: float, rms: float
) -> None:
    """RMS 0.2 sqrt(max) sqrt(k) / sqrt(m n) = 0.2 sqrt(k / min)."""
    parameter = nn.Parameter(torch.zeros(shape))
    (moved,) = steps_of(NuMuon([parameter], lr=1.0, rank_schedule=f"fixed:{fraction}"), parameter, gradients(shape, 1))
    assert moved.square().mean().sqrt().item() == pytest.approx(rms, rel=1e-5)
    assert torch.linalg.matrix_rank(moved) == 16 * fraction


def test_adamw_is_torchs_adamw_bit_for_bit() -> None:
    start = [torch.randn(6, 4), torch.randn(5)]
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1}
    results = []
    for make in (lambda params: NuMuon(params, rule="adamw", **options), lambda p: torch.optim.AdamW(p, **options)):
        torch.manual_seed(1)
        params = [nn.Parameter(tensor.clone()) for tensor in start]
        optimizer = make(params)
        for _ in range(5):
            for parameter in params:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        results.append(params)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rule", ["numuon", "muon"])
def test_fused_experts_are_stepped_one_by_one(rule: str) -> None:
    """Gradients on scales 1e4 apart, so that a norm over the whole tensor would show."""
    grads = [g * torch.tensor([1e-2, 1.0, 1e2])[:, None, None] for g in gradients((3, 8, 12))]
    fused = nn.Parameter(torch.randn(3, 8, 12))
    single = [nn.Parameter(expert.clone()) for expert in fused.detach()]
    options: dict[str, Any] = {"rule": rule, "lr": LR, "weight_decay": DECAY, "rank_schedule": "fixed:0.5"}
    together = steps_of(NuMuon([fused], **options), fused, grads)[-1]
    apart = [
        steps_of(NuMuon([parameter], **options), parameter, [g[expert] for g in grads])[-1]
        for expert, parameter in enumerate(single)
    ]
    # Batched and single products may sum in another order.
    torch.testing.assert_close(together, torch.stack(apart), atol=1e-6, rtol=0)


def test_the_schedule_is_at_step_over_total_steps() -> None:
    parameter = nn.Parameter(torch.zeros(8, 8))
    optimizer = NuMuon([parameter], lr=1.0, rank_schedule="piecewise:1@0,0.5@0.25,0.25@0.5", total_steps=8)
    used, ranks, before = [], [], torch.zeros(8, 8)
    for weight in steps_of(optimizer, parameter, gradients((8, 8), 10)):
        ranks.append(int(torch.linalg.matrix_rank(weight - before, rtol=1e-4)))
        before = weight
    parameter = nn.Parameter(torch.zeros(8, 8))
    optimizer = NuMuon([parameter], rank_schedule="piecewise:1@0,0.5@0.25,0.25@0.5", total_steps=8)
    for grad in gradients((8, 8), 10):
        steps_of(optimizer, parameter, [grad])
        used.append(optimizer.param_groups[0]["rank_fraction"])
    assert used == [1.0] * 2 + [0.5] * 2 + [0.25] * 6  # past the end it stays
    assert ranks == [8] * 2 + [4] * 2 + [2] * 6


def mixed_groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    wide, square, muon, vector = params
    return [
        {"params": [wide, square], "rule": "numuon", "rank_schedule": "cosine:1:0.25", "total_steps": 10},
        {"params": [muon], "rule": "muon"},
        {"params": [vector], "rule": "adamw"},
    ]


def mixed_parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in [(6, 9), (7, 7), (9, 6), (5,)]]


def random_steps(optimizer: NuMuon, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        for parameter in params:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 4])
def test_saved_and_loaded_in_the_middle_it_ends_at_the_same_weights(stop: int, dtype: torch.dtype) -> None:
    whole = mixed_parameters(dtype)
    random_steps(NuMuon(mixed_groups(whole), weight_decay=DECAY), whole, range(10))

    first = mixed_parameters(dtype)
    optimizer = NuMuon(mixed_groups(first), weight_decay=DECAY)
    random_steps(optimizer, first, range(stop))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": [p.detach() for p in first]}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second = [nn.Parameter(weights) for weights in saved["weights"]]
    resumed = NuMuon(mixed_groups(second), weight_decay=DECAY)
    resumed.load_state_dict(saved["optimizer"])
    for parameter, before in zip(second[:3], first[:3], strict=True):
        momentum = resumed.state[parameter]["momentum"]
        assert momentum.dtype == torch.float32
        assert torch.equal(momentum, optimizer.state[before]["momentum"])
        # A copy: going on does not change what was loaded.
        assert all(
            momentum.data_ptr() != s["momentum"].data_ptr()
            for s in saved["optimizer"]["state"].values()
            if "momentum" in s
        )
    random_steps(resumed, second, range(stop, 10))
    for parameter, expected in zip(second, whole, strict=True):
        assert torch.equal(parameter, expected)


def test_momentum_of_a_bfloat16_parameter_averages_in_float32() -> None:
    """A thousand small gradients after one large: in bfloat16 each would round away."""
    parameter = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    optimizer = NuMuon([parameter], lr=0.0, momentum=0.999, rank_schedule="fixed:1")
    steps_of(optimizer, parameter, [torch.ones(2, 3, dtype=torch.bfloat16)] * 200)
    momentum = optimizer.state[parameter]["momentum"]
    torch.testing.assert_close(momentum, torch.full((2, 3), 1 - 0.999**200), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 2, 3], ids=["numuon", "muon", "adamw"])
def test_a_gradient_that_is_not_finite_is_refused_and_nothing_moves(where: int, bad: float) -> None:
    params = mixed_parameters(torch.float32)
    optimizer = NuMuon(mixed_groups(params))
    random_steps(optimizer, params, range(2))
    weights, state = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict())
    for parameter in params:
        parameter.grad = torch.randn_like(parameter)
    params[where].grad = torch.full_like(params[where], bad)
    with pytest.raises(LowRankError, match="is not finite at step 2") as caught:
        optimizer.step()
    assert str(list(params[where].shape)) in caught.value.message
    assert caught.value.hint
    assert all(torch.equal(parameter, old) for parameter, old in zip(params, weights, strict=True))
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert after["state"].keys() == state["state"].keys() == {0, 1, 2, 3}
    for index, tensors in state["state"].items():
        assert all(torch.equal(after["state"][index][name], old) for name, old in tensors.items())


def test_a_parameter_without_a_gradient_stays() -> None:
    params = mixed_parameters(torch.float32)
    before = copy.deepcopy(params)
    optimizer = NuMuon(mixed_groups(params), weight_decay=DECAY)
    optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(params, before, strict=True))
    params[1].grad = torch.randn(7, 7)
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


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 6), {"rule": "numuo"}, 'did you mean "numuon"'),
        ((4, 6), {"rule": "lion"}, 'unknown optimizer rule "lion"'),
        ((4, 6), {"rank_schedule": "fixed:0"}, "rank fraction must be in"),
        ((4, 6), {"rank_schedule": "fixed:1.5"}, "rank fraction must be in"),
        ((4, 6), {"rank_schedule": "cosine:1:0.25"}, "needs total_steps"),
        ((4, 6), {"rank_schedule": "cosine:1:0.25", "total_steps": 0}, "total_steps must be at least 1, got 0"),
        ((4,), {"rank_schedule": "fixed:1"}, r"rule numuon is for matrices; got parameters of shapes \[\(4,\)\]"),
        ((4,), {"rule": "muon"}, "rule muon is for matrices"),
        ((2, 2, 3, 3), {"rule": "muon"}, "rule muon is for matrices"),
    ],
)
def test_a_group_that_cannot_be_served_is_refused(
    shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    bad = nn.Parameter(torch.zeros(shape))
    with pytest.raises(UsageError, match=message):
        NuMuon([bad], **options)
    optimizer = NuMuon([nn.Parameter(torch.zeros(3, 3))], rank_schedule="fixed:1")
    with pytest.raises(UsageError, match=message):
        optimizer.add_param_group({"params": [bad], "rank_schedule": "fixed:1"} | options)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("rule", ["numuon", "muon", "adamw"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_training_lowers_the_loss(family: str, rule: str) -> None:
    """Thirty steps on one batch: from chance, ln 100 = 4.6 nats or more, to half of it."""
    model = build(family).train()
    optimizer = NuMuon(parameter_groups(model, rule=rule, lr=1e-2, rank_schedule="fixed:0.5"))
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
