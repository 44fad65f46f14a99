"""The order in which ranks are bought: closed forms, the loss that an allocation is to minimize, odd evidence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_kit.compression.allocation import ALLOCATIONS, Evidence
from lowrank_kit.compression.budget import allocate, floor_step
from lowrank_kit.compression.ladder import Ladder, ladder
from lowrank_kit.linalg.spectrum import effective_rank

SHAPES = [(64, 64), (32, 64), (160, 64), (64, 160), (48, 48)]
FORMS = ["factors", "pivoted"]


def evidence_of(values: Tensor) -> Evidence:
    """The same numbers whatever is asked for."""
    return Evidence(values, values, values)


def spectra(shapes: Sequence[tuple[int, int]], seed: int = 0, steepest: float = 3.0) -> list[Tensor]:
    """Decays between flat and steep."""
    generator = torch.Generator().manual_seed(seed)
    powers = steepest * torch.rand(len(shapes), generator=generator, dtype=torch.float64)
    scales = torch.rand(len(shapes), generator=generator, dtype=torch.float64) + 0.1
    return [
        scale * torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -power
        for shape, power, scale in zip(shapes, powers, scales, strict=True)
    ]


def ladders_of(shapes: Sequence[tuple[int, int]], form: str = "factors", align: int | None = 1) -> list[Ladder]:
    return [ladder(shape, form, None, align) for shape in shapes]


def dense_numbers(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def ranks(ladders: Sequence[Ladder], steps: Sequence[int]) -> list[int]:
    """With the stand-in above the cap for dense."""
    return [int(one.ranks[step]) for one, step in zip(ladders, steps, strict=True)]


def lost(ladders: Sequence[Ladder], steps: Sequence[int], scores: Sequence[Tensor]) -> float:
    """What `loss` minimizes, summed in the plainest way."""
    kept = [one.rank(step) for one, step in zip(ladders, steps, strict=True)]
    return sum(float(s[rank:].sum()) for s, rank in zip(scores, kept, strict=True) if rank is not None)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    shapes=st.lists(st.tuples(st.integers(8, 200), st.integers(8, 200)), min_size=1, max_size=8),
    percent=st.integers(30, 90),
)
def test_uniform_is_the_closed_form(shapes: list[tuple[int, int]], percent: int) -> None:
    keep = percent / 100
    ladders = ladders_of(shapes)
    steps = allocate(ladders, [Evidence()] * len(shapes), ALLOCATIONS["uniform"], int(keep * dense_numbers(shapes)))
    # Half a step each for the nearest rank, and the rest, less than the largest step, may go to any of them.
    rounding = sum((m + n) / 2 + 1 for m, n in shapes) / dense_numbers(shapes)
    largest = max(m + n for m, n in shapes)
    for (m, n), one, step in zip(shapes, ladders, steps, strict=True):
        if (rank := one.rank(step)) is not None:
            closed = keep * m * n / (m + n)
            assert closed - 1 - rounding * m * n / (m + n) <= rank <= closed + 1 + largest / (m + n)


@pytest.mark.parametrize(
    ("name", "wanted"), [("erank", lambda R, m, n: R), ("lagrange", lambda R, m, n: math.sqrt(R / (m + n)))]
)
def test_erank_and_lagrange_are_their_closed_forms(name: str, wanted: Callable[[float, int, int], float]) -> None:
    values = spectra(SHAPES, steepest=1.0)
    target = [wanted(effective_rank(s), *shape) for s, shape in zip(values, SHAPES, strict=True)]
    ladders, budget = ladders_of(SHAPES), int(0.25 * dense_numbers(SHAPES))
    steps = allocate(ladders, [evidence_of(s) for s in values], ALLOCATIONS[name], budget)
    even = allocate(ladders, [Evidence()] * len(SHAPES), ALLOCATIONS["uniform"], budget)
    free = [i for i, one in enumerate(ladders) if steps[i] > floor_step(one, even[i]) and one.rank(steps[i])]
    assert len(free) == len(SHAPES)
    # k_g = target_g * (what the others leave of the budget) / sum target_j (m + n): D-Rank's formula, within a step.
    spent = sum(int(ladders[i].costs[steps[i]]) for i in free)
    share = spent / sum(target[i] * sum(SHAPES[i]) for i in free)
    for i in free:
        assert abs(int(ladders[i].ranks[steps[i]]) - target[i] * share) <= 1.25


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.85])
def test_loss_is_as_good_as_trying_everything(form: str, share: float) -> None:
    shapes = [(24, 24), (12, 24), (30, 16)]
    for seed in range(12):
        scores = spectra(shapes, seed, steepest=1.0 + seed % 3)
        ladders, budget = ladders_of(shapes, form), int(share * dense_numbers(shapes))
        steps = allocate(ladders, [evidence_of(s) for s in scores], ALLOCATIONS["loss"], budget)
        even = allocate(ladders, [Evidence()] * len(shapes), ALLOCATIONS["uniform"], budget)
        floors = [floor_step(one, step) for one, step in zip(ladders, even, strict=True)]
        allowed = itertools.product(*(range(f, len(one)) for f, one in zip(floors, ladders, strict=True)))
        affordable = (
            tried
            for tried in allowed
            if sum(int(one.costs[step]) for one, step in zip(ladders, tried, strict=True)) <= budget
        )
        best = min(lost(ladders, tried, scores) for tried in affordable)
        assert lost(ladders, steps, scores) <= best + largest_offer(ladders, floors, scores)


def largest_offer(ladders: Sequence[Ladder], floors: Sequence[int], scores: Sequence[Tensor]) -> float:
    """The most that one purchase saves, where each goes to the step that saves most for its cost."""
    most = 0.0
    for one, floor, s in zip(ladders, floors, scores, strict=True):
        losses, costs = [lost([one], [step], [s]) for step in range(len(one))], one.costs.tolist()
        at = floor
        while at < len(one) - 1:
            rates = {to: (losses[at] - losses[to]) / (costs[to] - costs[at]) for to in range(at + 1, len(one))}
            to = max(rates, key=lambda step: (rates[step], step))
            most, at = max(most, losses[at] - losses[to]), to
    return most


@pytest.mark.parametrize("form", FORMS)
def test_loss_beats_uniform_on_its_own_objective(form: str) -> None:
    for seed in range(10):
        shapes = SHAPES * 3
        scores = spectra(shapes, seed)
        for share in (0.2, 0.4, 0.6, 0.8):
            ladders, budget = ladders_of(shapes, form), int(share * dense_numbers(shapes))
            known = [evidence_of(s) for s in scores]
            by_loss, even = (
                lost(ladders, allocate(ladders, known, ALLOCATIONS[name], budget), scores)
                for name in ("loss", "uniform")
            )
            assert by_loss < even


def test_a_flat_tail_is_jumped_over() -> None:
    # By ranks a nat costs 129 numbers in the first and 65 in the second; to the end of the first it costs 42.
    scores = [torch.ones(64), torch.tensor(31 * [2.0] + 33 * [0.0])]
    ladders = ladders_of([(64, 64), (64, 64)])
    assert ladders[0].rank(30) == 31
    budget = int(ladders[0].costs[-1] + ladders[1].costs[15])
    steps = allocate(ladders, [evidence_of(s) for s in scores], ALLOCATIONS["loss"], budget)
    assert [one.rank(step) for one, step in zip(ladders, steps, strict=True)] == [None, 16]


def test_a_jump_is_made_by_one_and_not_half_by_both() -> None:
    ladders = ladders_of([(64, 64)] * 2)
    budget = int(ladders[0].costs[-1] + ladders[1].costs[15])
    steps = allocate(ladders, [evidence_of(torch.ones(64))] * 2, ALLOCATIONS["loss"], budget)
    assert sorted(steps) == [15, len(ladders[0]) - 1]


def test_nearest_ranks_are_bought() -> None:
    # Of the sixteen ranks that are paid for, not the next ones down and then the first matrix one more.
    ladders = ladders_of([(64, 64)] * 2)
    for wanted, bought in {(10.4, 5.6): [10, 6], (10.6, 5.4): [11, 5], (5.4, 10.6): [5, 11]}.items():
        known = [evidence_of(with_effective_rank(want)) for want in wanted]
        steps = allocate(ladders, known, ALLOCATIONS["erank"], 16 * 128 + 2)
        assert ranks(ladders, steps) == bought


def with_effective_rank(wanted: float) -> Tensor:
    """64 numbers of this effective rank: some equal ones and a part of one."""
    low, high = 0.0, 1.0
    for _ in range(60):
        part = (low + high) / 2
        values = torch.zeros(64, dtype=torch.float64)
        values[: int(wanted)] = 1
        values[int(wanted)] = part
        low, high = (part, high) if effective_rank(values) < wanted else (low, part)
    return values


@pytest.mark.parametrize("name", ["erank", "lagrange", "loss"])
@pytest.mark.parametrize("scale", [1e-12, 3.7, 1e12])
def test_scale_does_not_matter(name: str, scale: float) -> None:
    values = spectra(SHAPES)
    budget = int(0.5 * dense_numbers(SHAPES))
    plain, scaled = (
        allocate(ladders_of(SHAPES), [evidence_of(by * s) for s in values], ALLOCATIONS[name], budget)
        for by in (1.0, scale)
    )
    assert plain == scaled


@pytest.mark.parametrize("name", ["erank", "lagrange", "loss"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(64),
        torch.ones(64),
        torch.eye(64)[0],
        torch.full((64,), math.inf),
        torch.tensor([math.inf] + 63 * [1.0]),
        torch.full((64,), 1e308, dtype=torch.float64),
        torch.full((64,), 5e-324, dtype=torch.float64),
        torch.full((64,), math.nan),
    ],
    ids=["zero", "equal", "rank 1", "infinite", "one infinite", "huge", "tiny", "nan"],
)
def test_odd_evidence_still_gives_an_order(name: str, form: str, odd: Tensor) -> None:
    ladders = ladders_of([(64, 64)] * 3, form)
    known = [evidence_of(odd), evidence_of(spectra([(64, 64)])[0]), evidence_of(torch.zeros(64))]
    for one, evidence in zip(ladders, known, strict=True):
        levels = ALLOCATIONS[name].levels(one, evidence)
        assert len(levels) == len(one) - 1
        assert not np.isnan(levels).any()
        assert (levels >= 0).all()
        assert (levels[1:] >= levels[:-1]).all()
    budget = 64 * 64 * 2
    steps = allocate(ladders, known, ALLOCATIONS[name], budget)
    assert sum(int(one.costs[step]) for one, step in zip(ladders, steps, strict=True)) <= budget
    assert steps[2] <= steps[1]


def test_all_zero_matrices_are_treated_alike() -> None:
    ladders = ladders_of([(64, 64)] * 4)
    for name in ("erank", "lagrange", "loss"):
        steps = allocate(ladders, [evidence_of(torch.zeros(64))] * 4, ALLOCATIONS[name], 4 * 64 * 32)
        assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("name", ["erank", "lagrange", "loss"])
def test_missing_evidence(name: str) -> None:
    with pytest.raises(ValueError, match="evidence that is not there"):
        allocate(ladders_of(SHAPES), [Evidence()] * len(SHAPES), ALLOCATIONS[name], 10_000)


def test_every_allocation_says_what_it_is() -> None:
    assert list(ALLOCATIONS) == ["uniform", "erank", "lagrange", "loss"]
    assert {a.needs for a in ALLOCATIONS.values()} == {"nothing", "weights", "inputs", "loss"}
    assert all(a.title and a.source for a in ALLOCATIONS.values())
