"""The contract that every way to find the rank-k step keeps, and what each keeps between steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_kit.linalg.subspace import OVERSAMPLING, basis_columns, warm_topk_polar
from lowrank_kit.linalg.topk import lmo_ratio
from lowrank_kit.optim import modes
from lowrank_kit.optim.modes import TOPK, Batch, direction, make_memory, settle_health
from tests.linalg.cases import CASES, DTYPES, orthonormal, with_spectrum


@dataclass(frozen=True)
class Row:
    """What a mode promises.

    Args:
        least_ratio: LMO ratio that it keeps to.
        rounding: how far its singular values may be from 0 and 1, and its steps from one another where only rounding
            parts them.
        soft: directions at the edge pass in part, so that not the rank but the nuclear norm is at most k.
        coarse: rounds the momentum to bfloat16, so that one of low rank has further directions.
        memory: key of what it keeps between steps.
    """

    least_ratio: float
    rounding: float
    soft: bool = False
    coarse: bool = False
    memory: str | None = None


# On an accelerator warm takes QR sweeps in place of eigh, and products of 8 bits of mantissa.
ACCELERATOR = "warm on an accelerator"
ROWS = {
    "warm": Row(0.995, 1e-5, memory="basis"),
    ACCELERATOR: Row(0.995, 1e-2, coarse=True, memory="basis"),
    "krylov": Row(0.995, 1e-5),
    "exact": Row(0.99999, 1e-5),
    "filter": Row(0.99, 1e-3, soft=True, memory="threshold"),
}


def test_every_mode_has_a_row() -> None:
    assert set(ROWS) == {*TOPK, ACCELERATOR}


@pytest.fixture
def row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a row of the contract; the accelerator's takes its path on the CPU."""
    if request.param == ACCELERATOR:
        path = partial(warm_topk_polar, factorize=False, dtype=torch.bfloat16)
        monkeypatch.setattr(modes, "warm_topk_polar", path)
    return request.param


by_row = pytest.mark.parametrize("row", [*TOPK, ACCELERATOR], indirect=True)
by_memory = pytest.mark.parametrize("row", [name for name, row in ROWS.items() if row.memory], indirect=True)


@dataclass
class Steps:
    """A group of parameters of one shape in a mode, step by step.

    Args:
        row: of the contract.
        k: rank of the step.
        side: min(out, in).
        count: how many parameters.
        options: further keys of the group.
    """

    row: str
    k: int
    side: int
    count: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.states: list[dict[str, Tensor]] = [{} for _ in range(self.count)]
        self.group: dict[str, Any] = {
            "rule": "numuon",
            "topk": self.row.removesuffix(" on an accelerator"),
            "rank_fraction": self.k / self.side,
            "rank_multiple": 1,
            "oversampling": OVERSAMPLING,
            "basis_dtype": "float32",
            "step": 0,
            "health_every": 0,
            "lmo_ratio": None,
            "params": [None] * self.count,
        } | self.options

    def __call__(self, M: Tensor) -> Tensor:
        """The step of momenta [parameters, ..., out, in], as the optimizer takes it."""
        indices = list(range(self.count))
        cold = make_memory(Batch(self.group, self.states, indices), M.shape[1:], M.device)
        batch = Batch(self.group, self.states, indices, cold=cold)
        # At full rank `direction` leaves the mode aside.
        step = direction(M, batch) if modes.is_truncated(self.group) else TOPK[self.group["topk"]](M, self.k, batch)
        for ratio in batch.ratios:
            settle_health(self.group, ratio)
        self.group["step"] += 1
        return step


def assert_feasible(step: Tensor, k: int, rank: int, promise: Row) -> None:
    """Singular values 0 or 1, in part where the edge is soft; rank at most k and at most that of the momentum."""
    s = torch.linalg.svdvals(step.double())
    assert s[..., 0].max() <= 1.02
    if promise.soft:
        assert (s.sum(-1) <= k * (1 + 1e-4)).all()
        return
    used = min(k, rank)
    assert (s[..., :used] > 1 - promise.rounding).all()
    assert (s[..., k if promise.coarse else used :] < promise.rounding).all()


@by_row
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_contract(case: str, dtype: torch.dtype, row: str) -> None:
    """Every k up to full rank, three steps on a momentum that stays: as good as the exact step, and feasible."""
    exact, rank = CASES[case]()
    M, promise = exact.to(dtype), ROWS[row]
    for k in range(1, min(M.shape) + 1):
        steps = Steps(row, k, min(M.shape))
        for _ in range(3):
            step = steps(M[None])[0]
        assert step.shape == M.shape
        # The exact step takes float64 as it is.
        assert step.dtype == (torch.promote_types(dtype, torch.float32) if row == "exact" else torch.float32)
        assert step.isfinite().all()
        assert_feasible(step, k, rank, promise)
        assert lmo_ratio(M, step, k) > promise.least_ratio


def drifting(shape: tuple[int, int], steps: int) -> Iterator[Tensor]:
    """Momentum of gradients that are a signal and noise: a spectrum that falls to a hundredth, turning slowly."""
    side = min(shape)
    spectrum = 10 * torch.logspace(0, -2, side)
    U, V = (orthonormal(n, side).float() for n in shape)
    M = torch.zeros(shape)
    for _ in range(steps):
        # Toward orthonormal again by one step of Newton, which flips no sign as QR does.
        U, V = (X + 0.02 * torch.randn_like(X) / len(X) ** 0.5 for X in (U, V))
        U, V = (1.5 * X - 0.5 * X @ (X.mT @ X) for X in (U, V))
        M = M.lerp((U * spectrum) @ V.mT + 0.1 * torch.randn(shape), 0.05)
        yield M


@by_row
@pytest.mark.parametrize("k", [8, 24, 48])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (96, 96)])
def test_on_momentum_that_drifts(shape: tuple[int, int], k: int, row: str) -> None:
    """After six steps: QR sweeps need some to bring neighbours a twentieth apart in order."""
    promise, steps = ROWS[row], Steps(row, k, 96)
    for number, M in enumerate(drifting(shape, 8)):
        step = steps(M[None])[0]
        assert_feasible(step, k, 96, promise)
        assert lmo_ratio(M, step, k) > (promise.least_ratio if number >= 6 else 0.97)


@by_row
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-66, 2.0**66, 2.0**100])
def test_the_step_does_not_depend_on_the_scale(scale: float, row: str) -> None:
    """1e-30 to 1e30, whose squares float32 cannot hold. Powers of two, which change no digit: bit by bit."""
    M = torch.randn(1, 20, 30)
    steps, scaled = Steps(row, 6, 20), Steps(row, 6, 20)
    for _ in range(2):
        assert torch.equal(scaled(scale * M), steps(M))


@by_row
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (20, 20)])
def test_the_step_turns_with_the_momentum(shape: tuple[int, int], row: str) -> None:
    """step(Q M P^T) = Q step(M) P^T, the basis turned likewise. Krylov's is random, but beside a gap that is no matter.

    Rounding in bfloat16, of half a percent, is in proportion to s_1 and turns the direction of s_6 three times as far.
    """
    rows, columns = shape
    M = with_spectrum(rows, columns, torch.where(torch.arange(20) < 6, 0.8 ** torch.arange(20), 1e-4)).float()
    Q, P = orthonormal(rows, rows).float(), orthonormal(columns, columns).float()
    steps, turned = Steps(row, 6, 20), Steps(row, 6, 20)
    for _ in range(3):
        step, other = steps(M[None])[0], turned((Q @ M @ P.mT)[None])[0]
        torch.testing.assert_close(other, Q @ step @ P.mT, atol=0.02 if ROWS[row].coarse else 1e-4, rtol=0)


@by_row
def test_a_repeat_is_bit_equal(row: str) -> None:
    """Whatever torch's own generator has been doing."""
    momenta, runs = [torch.randn(3, 40, 60) for _ in range(3)], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        steps = Steps(row, 10, 40, count=3)
        runs.append([steps(M) for M in momenta])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@by_row
def test_a_batch_is_its_matrices(row: str) -> None:
    """Fused experts of several parameters, one without a gradient yet and one of rank one, on scales 1e20 apart."""
    M = torch.randn(2, 4, 12, 18) * torch.logspace(-10, 10, 8).reshape(2, 4, 1, 1)
    M[0, 1] = 0
    M[1, 2] = torch.outer(torch.randn(12), torch.randn(18))
    promise, steps = ROWS[row], Steps(row, 4, 12, count=2)
    for _ in range(4):
        step = steps(M)
    assert step.shape == M.shape
    assert torch.equal(step[0, 1], torch.zeros(12, 18))
    for matrix, one in zip(M.flatten(0, 1), step.flatten(0, 1), strict=True):
        rank = int(torch.linalg.matrix_rank(matrix))
        assert_feasible(one, 4, rank, promise)
        # Rounded to bfloat16, what is left of rank one has a second direction.
        assert lmo_ratio(matrix, one, 4) > promise.least_ratio


@by_row
@pytest.mark.parametrize("shape", [(1, 0, 12, 18), (2, 0, 18, 12)])
def test_no_experts_no_step(shape: tuple[int, ...], row: str) -> None:
    assert Steps(row, 4, 12, count=shape[0])(torch.zeros(shape)).shape == shape


@by_memory
@pytest.mark.parametrize("experts", [(), (3,)])
def test_memory_is_made_once_by_place_and_step(experts: tuple[int, ...], row: str) -> None:
    """Not by which parameters a process happens to hold: each gets the same alone as together."""
    key, shape = f"{ROWS[row].memory}.1", torch.Size((*experts, 40, 30))
    steps = Steps(row, 5, 30, count=3, options={"step": 7})
    make = partial(make_memory, shape=shape, device=torch.device("cpu"))
    assert make(Batch(steps.group, steps.states, [0, 1, 2], part=1))
    assert [set(state) for state in steps.states] == [{key}] * 3
    before = [state[key] for state in steps.states]
    assert not make(Batch(steps.group, steps.states, [0, 1, 2], part=1))
    assert all(state[key] is memory for state, memory in zip(steps.states, before, strict=True))
    alone: list[dict[str, Tensor]] = [{}]
    assert make(Batch(steps.group, alone, [2], part=1))
    assert torch.equal(alone[0][key], before[2])
    if ROWS[row].memory == "basis":
        assert before[0].shape == (*experts, 30, basis_columns(5, 30))
        assert not torch.equal(before[0], before[1])
        later: list[dict[str, Tensor]] = [{}]
        assert make(Batch({**steps.group, "step": 8}, later, [2], part=1))
        assert not torch.equal(later[0][key], before[2])
    else:
        assert before[0].shape == (*experts, 1, 1)


@pytest.mark.parametrize("mode", [mode for mode in TOPK if not ROWS[mode].memory])
def test_modes_without_memory_keep_none(mode: str) -> None:
    steps = Steps(mode, 5, 20)
    steps(torch.randn(1, 20, 30))
    assert steps.states == [{}]


@by_memory
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_follows_the_rank_down_and_up(dtype: str, row: str) -> None:
    """Each change is served at once, by what is kept: no state is made anew, none grows stale."""
    promise, M = ROWS[row], with_spectrum(120, 80, 0.9 ** torch.arange(80)).float()[None]
    steps = Steps(row, 30, 80, options={"basis_dtype": dtype})
    for k in (30, 30, 30, 12, 12, 48, 48, 48):
        steps.k, steps.group["rank_fraction"] = k, k / 80
        step = steps(M)[0]
        if promise.memory == "basis":
            kept = steps.states[0]["basis.0"]
            assert kept.shape == (80, basis_columns(k, 80))
            assert kept.dtype == getattr(torch, dtype)
        else:
            # Of the k that the step had: between s_k and s_{k + 1}, in units of the norm.
            s = 0.9 ** torch.arange(80).double()
            assert s[k] < steps.states[0]["threshold.0"].item() * s.norm() < s[k - 1]
        assert_feasible(step, k, 80, promise)
        # Up from 12 to 48 the new columns are random for a step.
        assert lmo_ratio(M[0], step, k) > 0.985
    assert lmo_ratio(M[0], step, 48) > promise.least_ratio


@by_memory
def test_memory_saves_work(row: str) -> None:
    """Noise, where one iteration is not enough: the steps get better. A threshold that is found stays."""
    promise, M = ROWS[row], torch.randn(1, 60, 90)
    steps = Steps(row, 6, 60)
    ratios = [lmo_ratio(M[0], steps(M)[0], 6) for _ in range(6)]
    if promise.memory == "basis":
        assert ratios[-1] - ratios[0] > 0.002
    else:
        kept = steps.states[0]["threshold.0"].clone()
        steps(M)
        assert torch.equal(steps.states[0]["threshold.0"], kept)


@by_row
def test_the_health_check_writes_the_ratio_of_one_matrix(row: str) -> None:
    """At the first rank-k step, here 1, and at steps 3, 6, ... of matrix 0, 1, 2, ..."""
    steps = Steps(row, 4, 12, count=2, options={"health_every": 3, "step": 1})
    momenta = [torch.randn(2, 12, 18) for _ in range(6)]
    seen = []
    for M in momenta:
        step = steps(M)
        seen.append((steps.group["lmo_ratio"], [lmo_ratio(m, d, 4) for m, d in zip(M, step, strict=True)]))
    assert seen[0][0] == seen[1][0] == seen[0][1][0]  # step 1: turn 0
    assert seen[2][0] == seen[3][0] == seen[4][0] == seen[2][1][1]  # step 3: turn 1
    assert seen[5][0] == seen[5][1][0]  # step 6: turn 2
    assert steps.group["oversampling"] == OVERSAMPLING


@by_row
def test_a_bad_ratio_raises_the_oversampling_of_warm(row: str) -> None:
    """Momentum that is another one at every check: a basis that knows the one before it is as good as random."""
    steps = Steps(row, 16, 80)
    steps(torch.randn(1, 80, 100))
    steps.group["health_every"] = 1
    seen = []
    for _ in range(5):
        steps(torch.randn(1, 80, 100))
        seen.append(steps.group["oversampling"])
    if ROWS[row].memory == "basis":
        assert seen == pytest.approx([0.15, 0.225, 0.3375, 0.5, 0.5])
        assert 0.8 < steps.group["lmo_ratio"] < modes.LEAST_LMO_RATIO
        assert steps.states[0]["basis.0"].shape == (80, 16 + 8 + 16)
    else:
        assert seen == [OVERSAMPLING] * 5
