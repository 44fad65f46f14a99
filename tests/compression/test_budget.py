"""The knapsack: within the budget, nothing affordable left over, floors and caps held, ranks aligned."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_kit.compression.allocation import ALLOCATIONS, Evidence
from lowrank_kit.compression.budget import allocate, floor_step
from lowrank_kit.compression.forms import FORMS
from lowrank_kit.compression.ladder import Ladder, default_align, ladder

SIDES = st.integers(2, 120)
SHAPES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=6)
FORM_NAMES = st.sampled_from(sorted(FORMS))
ALIGNS = st.sampled_from([None, 1, 2, 3, 8, 16])
DTYPES = st.sampled_from([None, "F32", "BF16"])


def count(form: str, shape: tuple[int, int], rank: int | None, dtype: str | None) -> int:
    """Numbers or bytes, from the tensors themselves."""
    width = {None: 1, "F32": 4, "BF16": 2}[dtype]
    if rank is None:
        return math.prod(shape) * width
    total = 0
    for name, _, size in FORMS[form].tensors("x", "F32", shape, rank):
        total += math.prod(size) * (4 if dtype and name.endswith("index") else width)
    return total


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.tuples(SIDES, SIDES), FORM_NAMES, DTYPES, ALIGNS)
def test_a_ladder_is_all_that_saves(shape: tuple[int, int], form: str, dtype: str | None, align: int | None) -> None:
    one = ladder(shape, form, dtype, align)
    dense = count(form, shape, None, dtype)
    step = align or default_align(shape)
    saving = [r for r in range(1, min(shape) + 1) if count(form, shape, r, dtype) < dense]
    cap = max(saving, default=0)
    assert saving == list(range(1, cap + 1))
    offered = [one.rank(i) for i in range(len(one))]
    assert offered[-1] is None
    assert offered[:-1] == [r for r in saving if r % step == 0 or (r < step and r.bit_count() == 1)]
    assert one.costs.tolist() == [count(form, shape, rank, dtype) for rank in offered]
    assert (one.costs[1:] > one.costs[:-1]).all()
    assert one.ranks[-1] == cap + 1


def test_default_alignment_goes_with_the_smaller_side() -> None:
    sides = {(4096, 14336): 16, (14336, 4096): 16, (1024, 4096): 16, (1023, 9999): 8, (512, 512): 8, (128, 4096): 2}
    assert {shape: default_align(shape) for shape in sides} == sides
    assert default_align((127, 127)) == default_align((2, 2)) == 1


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    shapes=SHAPES,
    form=FORM_NAMES,
    dtype=DTYPES,
    align=ALIGNS,
    name=st.sampled_from(sorted(ALLOCATIONS)),
    share=st.floats(0, 1),
    seed=st.integers(0, 10),
)
def test_within_the_budget_and_nothing_affordable_left(
    shapes: list[tuple[int, int]], form: str, dtype: str | None, align: int | None, name: str, share: float, seed: int
) -> None:
    ladders = [ladder(shape, form, dtype, align) for shape in shapes]
    least = sum(int(one.costs[0]) for one in ladders)
    most = sum(int(one.costs[-1]) for one in ladders)
    budget = least + int(share * (most - least))
    generator = torch.Generator().manual_seed(seed)
    values = [torch.rand(min(s), generator=generator).sort(descending=True).values ** (seed + 1) for s in shapes]
    known = [Evidence(v, v, v) for v in values]
    steps = allocate(ladders, known, ALLOCATIONS[name], budget)
    spent = sum(count(form, s, one.rank(i), dtype) for s, one, i in zip(shapes, ladders, steps, strict=True))
    assert spent <= budget
    for one, step in zip(ladders, steps, strict=True):
        if step + 1 < len(one):
            assert spent + int(one.costs[step + 1] - one.costs[step]) > budget
    even = allocate(ladders, known, ALLOCATIONS["uniform"], budget)
    if name != "uniform":
        for one, step, uniform in zip(ladders, steps, even, strict=True):
            assert 2 * one.ranks[step] >= one.ranks[uniform]
    assert steps == allocate(ladders, known, ALLOCATIONS[name], budget)


def test_the_floor_is_half_the_uniform_rank() -> None:
    one = ladder((256, 256), "factors", None, 8)  # 1, 2, 4, 8, 16, ..., 120, dense
    at = {rank: step for step, rank in enumerate(one.ranks.tolist())}
    halves = {1: 1, 2: 1, 4: 2, 8: 4, 16: 8, 24: 16, 32: 16, 120: 64}
    assert {rank: int(one.ranks[floor_step(one, at[rank])]) for rank in halves} == halves
    assert one.ranks[floor_step(one, len(one) - 1)] == 64


def test_a_matrix_that_is_worth_nothing_keeps_its_floor() -> None:
    ladders = [ladder((128, 128), "factors", None, 1)] * 2
    budget = 128 * 128  # half of both
    even = allocate(ladders, [Evidence()] * 2, ALLOCATIONS["uniform"], budget)
    assert [ladders[0].rank(step) for step in even] == [32, 31]  # sentinels: not 32 twice
    known = [Evidence(v, v, v) for v in (torch.zeros(128), torch.ones(128))]
    for name in ("erank", "lagrange", "loss"):
        steps = allocate(ladders, known, ALLOCATIONS[name], budget)
        assert ladders[0].rank(steps[0]) == 16
        assert ladders[1].rank(steps[1]) == 47


def test_what_does_not_fit_is_passed_over() -> None:
    # The next step of the large matrix costs a number more than is left; the small one takes it all.
    large, small = ladder((512, 512), "factors", None, 16), ladder((16, 16), "factors", None, 1)
    budget = int(large.costs[6] + small.costs[0]) - 1
    steps = allocate([large, small], [Evidence()] * 2, ALLOCATIONS["uniform"], budget)
    assert (steps[0], small.rank(steps[1])) == (5, None)


def test_matrices_that_cannot_be_factorized_cost_what_they_cost() -> None:
    tiny = ladder((2, 2), "factors", None, 1)
    assert (len(tiny), tiny.rank(0), tiny.costs.tolist()) == (1, None, [4])
    one = ladder((64, 64), "factors", None, 1)
    steps = allocate([tiny, one], [Evidence()] * 2, ALLOCATIONS["uniform"], 4 + int(one.costs[7]))
    assert steps == [0, 7]
    assert allocate([], [], ALLOCATIONS["uniform"], 0) == []


def test_less_than_the_first_steps() -> None:
    one: Ladder = ladder((64, 64), "factors", None, 1)
    assert allocate([one], [Evidence()], ALLOCATIONS["uniform"], 129) == [0]
    with pytest.raises(ValueError, match="a budget of 128 is less than the 129 of the first steps"):
        allocate([one], [Evidence()], ALLOCATIONS["uniform"], 128)
